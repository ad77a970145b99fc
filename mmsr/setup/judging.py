"""The judge in the reward that --reward-judge names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mmsr.config import Config
from mmsr.system.errors import UserError

if TYPE_CHECKING:
    from mmsr.data.reward_judge import RewardJudge
    from mmsr.net.completions import ChatServer


def reward_judge_server(config: Config, spend: Callable[[str], None] | None = None) -> ChatServer:
    """The server of --reward-judge. `spend(provider)` is called before every call that is paid for. Nothing is asked.

    Raises UserError for an address or a key that cannot be used, and for a key without a budget.
    """
    from mmsr.net.client import Client
    from mmsr.net.completions import ChatServer, judge_variable
    from mmsr.net.http import environment_key

    variable = judge_variable()
    key = environment_key(variable)
    if key and not config.budget:
        paid = f"with a key ({variable}) every verdict may cost money"
        advice = "give --budget N, the paid calls that the run may make, or export JUDGE_API_KEY= for a free server"
        raise UserError(f"--reward-judge: {paid}; {advice}")
    return ChatServer(config.reward_judge, config.judge_model, key, Client(), spend=spend, whole=True)


def open_reward_judge(config: Config, spend: Callable[[str], None] | None, shown: bool) -> RewardJudge:
    """The judge, whose replies are kept in OUT/judge.jsonl. `shown`: with a progress bar. Raises UserError."""
    from mmsr.data.judge import Judge
    from mmsr.data.reward_judge import RewardJudge, complete

    ask = complete(reward_judge_server(config, spend))
    judge = Judge(ask, config.judge_model, Path(config.out) / "judge.jsonl", shown)
    return RewardJudge(judge, config.reward_rule)
