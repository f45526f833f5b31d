"""Who says how good an attempt was."""

REWARDS = {
    "verifier": "reflux.rewards.verifier:Verifier",
    "environment": "reflux.rewards.environment_reward:EnvironmentReward",
}
