"""Endpoints: servers that speak OpenAI's chat protocol. The protocol of the parts is in `base.py`."""

ENDPOINTS = {
    "openai": "reflux.engines.endpoints.openai_api:OpenAI",
    "local": "reflux.rewards.oracle.rule_server:RuleServer",
}
