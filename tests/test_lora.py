"""Adapters: against PEFT, in sampling and in training, on one process and several."""
