"""The environment plays the same conversation twice."""

import verifiers.v1 as vf

__all__ = ["RepeatingEnv"]


class RepeatingEnv(vf.Env[vf.SingleAgentEnvConfig]):
    async def run(self, task, agents):
        await agents.agent.run(task)
        await agents.agent.run(task)
