"""Who says how good an attempt was."""

REWARDS = {"verifier": "reflux.rewards.verifier:Verifier"}
