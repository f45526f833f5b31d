import verifiers.v1 as vf

__all__ = ["TwoSeatsEnv"]


class TwoSeatsConfig(vf.EnvConfig):
    solver: vf.AgentConfig = vf.AgentConfig()
    critic: vf.AgentConfig = vf.AgentConfig(harness={"id": "reflux_chat"}, runtime={"type": "subprocess"})


class TwoSeatsEnv(vf.Env[TwoSeatsConfig]):
    async def run(self, task, agents):
        await agents.solver.run(task)
        await agents.critic.run(task)
