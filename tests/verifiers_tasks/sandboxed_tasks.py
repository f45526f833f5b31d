import verifiers.v1 as vf

__all__ = ["Sandboxed"]


class SandboxedTask(vf.Task[vf.TaskData]):
    @vf.reward
    async def ran(self, trace: vf.Trace, runtime: vf.Runtime) -> float:
        return 1.0


class Sandboxed(vf.Taskset[SandboxedTask]):
    def load(self):
        return [SandboxedTask(vf.TaskData(prompt="?"))]
