"""Rewards: they judge attempts. The protocol is in `base.py`."""

REWARDS = {
    "verifier": "reflux.rewards.verifier:Verifier",
    "environment": "reflux.rewards.environment_reward:EnvironmentReward",
    "recorded": "reflux.rewards.recorded_reward:RecordedReward",
    "rubric": "reflux.rewards.rubric:RubricReward",
    "discriminator": "reflux.rewards.discriminator:DiscriminatorReward",
    "judge": "reflux.rewards.judge:JudgeReward",
}
