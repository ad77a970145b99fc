"""Adapters' folders: read and written in PEFT's form."""
