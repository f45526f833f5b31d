"""The environment begins a second conversation with other messages."""

import verifiers.v1 as vf

__all__ = ["RewritingEnv"]


class RewritingEnv(vf.Env[vf.SingleAgentEnvConfig]):
    async def run(self, task, agents):
        await agents.agent.run(task)
        await agents.agent.run(task.with_data(prompt="Another question."))
