import verifiers.v1 as vf

__all__ = ["FailingEnv"]


class FailingEnv(vf.Env[vf.SingleAgentEnvConfig]):
    async def run(self, task, agents):
        await agents.agent.run(task)
        raise RuntimeError("the world ended")
