"""The training loop. The same loop serves every method, synchronous or asynchronous."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, closing
from functools import partial
from typing import Any

from reflux import checks
from reflux.config.context import PartContext
from reflux.config.recipe import RunConfig
from reflux.credit.base import share_credit
from reflux.extrapolation import base as extrapolations
from reflux.extrapolation.score import CurrentScore, scorer
from reflux.learners.base import OpenLearner
from reflux.learners.learning import learn, observe
from reflux.loss.step import StepRequest
from reflux.models.text import prepare_torch
from reflux.rewards.base import OpenReward, judge
from reflux.rewards.weighted import open_rewards
from reflux.runtime.pipeline import Pipeline
from reflux.runtime.services import Services
from reflux.runtime.signals import stopping_on_signals
from reflux.samplers.base import OpenSampler
from reflux.teachers.collection import Teachers
from reflux.training import Options, Run
from reflux.types import Group, Prompt

Parts = tuple[OpenLearner, OpenSampler, OpenReward | None, Teachers, extrapolations.OpenExtrapolation]


async def train(cfg: RunConfig, options: Options) -> dict[str, Any]:
    """Train a student and return the run's summary.

    Each step: prompts -> student samples -> rewards -> teachers answer -> credit rules -> optimiser step ->
    publish the new weights.

    At most `max_staleness` optimiser steps lie between sampling an attempt and learning from it; 0 is
    strictly on-policy. The loop is the same for text and for flows.
    """
    # checks.join raises ConfigError before any weight is loaded; Run.open finds the step to resume from
    run = Run.open(cfg, checks.join(cfg), options)
    if run.finished:
        with closing(run):
            return run.summary()

    async with (
        lasting(run),
        open_parts(cfg, run.context, run.services) as (learner, sampler, reward, teachers, extrapolation),
    ):
        # parts with state load it from the checkpoint; on a new run extrapolation stores the start weights
        run.restore(learner, teachers, extrapolation)

        async def publish(step: int) -> None:
            # give the new weights to the sampler and to teachers that follow the student
            await sampler.publish(learner.publish(), step)
            await teachers.publish(learner.publish(), step)

        compared_by = scorer(cfg.extrapolation, run.context, run.services)
        # scores the current weights on fixed prompts
        score = CurrentScore(compared_by, learner, partial(run.evaluation, sampler, teachers))

        # Attempts may be sampled up to max_staleness optimiser steps before they are trained on.
        async def attempt(prompt: Prompt, step: int) -> Group:
            # the student samples
            group = await sampler.sample(prompt, cfg.group_size, cfg.draw(step))
            # optional rewards: a verifier, an environment or your own reward
            await judge(reward, group)
            # each teacher answers in its own context
            await teachers.score([group], run.step_context(step), cohort=cfg.prompts_per_step)
            # write the attempts to disk before they are used
            run.write(group, step)
            return group

        await publish(run.step)
        if run.due("eval"):
            # before the first step, or after a resume if the evaluation of this step is missing
            await run.evaluate(learner, sampler, teachers, extrapolation)
        stream = Pipeline(
            run.prompts,
            attempt,
            first_step=run.step,
            steps=run.steps_left,
            per_step=cfg.prompts_per_step,
            max_staleness=cfg.max_staleness,
        )
        async with aclosing(stream):
            # aclosing cancels all attempts in flight when the block ends, also on an error
            async for groups in stream:
                step_context = run.step_context()
                # ask again only where an answer is missing or the teacher's context has changed
                await teachers.score(groups, step_context)
                # the current student's outputs, only if a part requires them
                await observe(learner, groups)
                # the teachers' log-probs at the current student's top-k, only if a part requires them
                await teachers.follow_up(groups)
                # credit rules set the weight and the advantage offset of each position
                share_credit(groups, cfg.credit, step_context)
                if extrapolation.fires(run.step + 1):
                    # wait for attempts in flight and start no new ones
                    await stream.settle()
                request = StepRequest(
                    groups, cfg.objectives, step_context, cfg.loss_aggregation, cfg.log_variance
                )
                # one optimiser step
                result = await learn(learner, request, run.keep_failed_batch)
                # extrapolation may move the weights further along their trajectory
                jumped = await extrapolation.after_step(learner.access, score, run.step + 1)
                if jumped:
                    # the weights are no longer those of the optimiser step
                    learner.version += 1
                    # sample the prompts in flight again with the new weights
                    stream.refresh()
                # give the new weights to the sampler and the teachers
                await publish(run.step + 1)
                # count the step and write its metrics
                run.advance(result, groups, learner, teachers, jumped, score.take())
                if run.due("eval"):
                    # An evaluation may give averaged weights to the sampler. Training attempts must not use
                    # them.
                    await stream.settle()
                    await run.evaluate(learner, sampler, teachers, extrapolation)
                if run.due("save"):
                    run.save(learner, teachers, extrapolation)
                run.stop_if_asked()
        await run.evaluate(learner, sampler, teachers, extrapolation)
        run.save(learner, teachers, extrapolation)
    return run.summary()


@asynccontextmanager
async def lasting(run: Run) -> AsyncIterator[None]:
    """Until the block ends, Ctrl-C and SIGTERM ask the run to stop. The run is closed at the end, also on an
    error.
    """
    with closing(run), stopping_on_signals(run):
        yield


@asynccontextmanager
async def open_parts(
    cfg: RunConfig, context: Callable[[str], PartContext], services: Services
) -> AsyncIterator[Parts]:
    """Open every part, the learner first. They are closed in reverse order, also on an error."""
    async with AsyncExitStack() as stack:
        prepare_torch(cfg.threads, cfg.deterministic)
        learner = await stack.enter_async_context(cfg.learner.open(context("learner"), services))
        sampler = await stack.enter_async_context(cfg.sampler.open(context("sampler"), services))
        reward = await stack.enter_async_context(open_rewards(cfg.rewards, context, services))
        opened = {
            name: (teacher, await stack.enter_async_context(teacher.open(context(name), services)))
            for name, teacher in cfg.teachers.items()
        }
        extrapolation = await stack.enter_async_context(
            extrapolations.opened(cfg.extrapolation, context, services)
        )
        objective_teachers = {objective.teacher for objective in cfg.objectives if objective.teacher}
        yield (
            learner,
            sampler,
            reward,
            Teachers(opened, context("learner").requirements, services, objective_teachers),
            extrapolation,
        )
