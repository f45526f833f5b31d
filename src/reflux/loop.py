"""The loop: one for sync and async, for every method."""

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
    """prompts -> student acts -> outcome -> teachers answer -> credit is shared out -> student moves ->
    everyone learns of it.

    `max_staleness` optimiser steps may lie between acting and moving; 0 is strictly on-policy. Nothing here
    knows tokens from flows.
    """
    # refuses in words before any weight is loaded; seeds, resume point
    run = Run.open(cfg, checks.join(cfg), options)
    if run.finished:
        with closing(run):
            return run.summary()

    async with (
        lasting(run),
        open_parts(cfg, run.context, run.services) as (learner, sampler, reward, teachers, extrapolation),
    ):
        # every part with state; extrapolation.start(learner.access) on a fresh run
        run.restore(learner, teachers, extrapolation)

        async def publish(step: int) -> None:
            # sampler and teachers learn of the new weights
            await sampler.publish(learner.publish(), step)
            await teachers.publish(learner.publish(), step)

        compared_by = scorer(cfg.extrapolation, run.context, run.services)
        # of these weights on fixed prompts
        score = CurrentScore(compared_by, learner, partial(run.evaluation, sampler, teachers))

        async def attempt(prompt: Prompt, step: int) -> Group:
            # may run ahead of training, never by more than max_staleness steps
            # the student acts
            group = await sampler.sample(prompt, cfg.group_size, cfg.draw(step))
            # optional: verifier, environment, or one of your own
            await judge(reward, group)
            # each in its own context
            await teachers.score([group], run.step_context(step), cohort=cfg.prompts_per_step)
            # on disk now, whatever happens next
            run.write(group, step)
            return group

        await publish(run.step)
        if run.due("eval"):
            # before the first step, or where a run ended before this was done
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
            # nothing is in flight once it is left, whatever happens
            async for groups in stream:
                step_context = run.step_context()
                # only what is missing, or whose context changed
                await teachers.score(groups, step_context)
                # what would the student say now? (only if wanted)
                await observe(learner, groups)
                # and the teachers, where it would say it? (only if wanted)
                await teachers.follow_up(groups)
                # how much does each position count?
                share_credit(groups, cfg.credit, step_context)
                if extrapolation.fires(run.step + 1):
                    # in-flight attempts finish, none start
                    await stream.settle()
                request = StepRequest(
                    groups, cfg.objectives, step_context, cfg.loss_aggregation, cfg.log_variance
                )
                # the student moves
                result = await learn(learner, request, run.keep_failed_batch)
                # and may jump ahead along its path
                jumped = await extrapolation.after_step(learner.access, score, run.step + 1)
                if jumped:
                    # other weights
                    learner.version += 1
                    # ask again what is in flight
                    stream.refresh()
                # everyone learns of it
                await publish(run.step + 1)
                # step += 1; metrics, staleness, shares, costs
                run.advance(result, groups, learner, teachers, jumped, score.take())
                if run.due("eval"):
                    # an evaluation may lend the sampler averaged weights: no attempt is drawn with those
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
    """Signals ask the run to stop for as long as it lasts; it is closed, whatever happens."""
    with closing(run), stopping_on_signals(run):
        yield


@asynccontextmanager
async def open_parts(
    cfg: RunConfig, context: Callable[[str], PartContext], services: Services
) -> AsyncIterator[Parts]:
    """Open every part, the learner first; close them in reverse, whatever happens."""
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
