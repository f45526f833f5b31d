"""Rewards: they judge attempts. The protocol is in `base.py`."""

REWARDS = {
    "verifier": "reflux.rewards.verifier:Verifier",
    "environment": "reflux.rewards.environment_reward:EnvironmentReward",
    "rubric": "reflux.rewards.rubric:RubricReward",
    "judge": "reflux.rewards.judge:JudgeReward",
}
