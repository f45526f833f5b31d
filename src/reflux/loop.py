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
    """prompts -> student acts -> outcome -> teachers answer -> credit is shared out -> student moves -> everyone learns of it.

    `max_staleness` optimiser steps may lie between acting and moving; 0 is strictly on-policy. Nothing here knows tokens from flows.
    """
    run = Run.open(cfg, checks.join(cfg), options)  # refuses in words before any weight is loaded; seeds, resume point
    if run.finished:
        with closing(run):
            return run.summary()

    async with lasting(run), open_parts(cfg, run.context, run.services) as (learner, sampler, reward, teachers, extrapolation):
        run.restore(learner, teachers, extrapolation)  # every part with state; extrapolation.start(learner.access) on a fresh run

        async def publish(step: int) -> None:  # sampler and teachers learn of the new weights
            await sampler.publish(learner.publish(), step)
            await teachers.publish(learner.publish(), step)

        compared_by = scorer(cfg.extrapolation, run.context, run.services)
        score = CurrentScore(compared_by, learner, partial(run.evaluation, sampler, teachers))  # of these weights on fixed prompts

        async def attempt(prompt: Prompt, step: int) -> Group:  # may run ahead of training, never by more than max_staleness steps
            group = await sampler.sample(prompt, cfg.group_size, cfg.draw(step))  # the student acts
            await judge(reward, group)  # optional: verifier, environment, or one of your own
            await teachers.score([group], run.step_context(step), cohort=cfg.prompts_per_step)  # each in its own context
            run.write(group, step)  # on disk now, whatever happens next
            return group

        await publish(run.step)
        if run.due("eval"):  # before the first step, or where a run ended before this was done
            await run.evaluate(learner, sampler, teachers, extrapolation)
        stream = Pipeline(
            run.prompts, attempt, first_step=run.step, steps=run.steps_left, per_step=cfg.prompts_per_step, max_staleness=cfg.max_staleness
        )
        async with aclosing(stream):  # nothing is in flight once it is left, whatever happens
            async for groups in stream:
                step_context = run.step_context()
                await teachers.score(groups, step_context)  # only what is missing, or whose context changed
                await observe(learner, groups)  # what would the student say now? (only if wanted)
                await teachers.follow_up(groups)  # and the teachers, where it would say it? (only if wanted)
                share_credit(groups, cfg.credit, step_context)  # how much does each position count?
                if extrapolation.fires(run.step + 1):
                    await stream.settle()  # in-flight attempts finish, none start
                request = StepRequest(groups, cfg.objectives, step_context, cfg.loss_aggregation, cfg.log_variance)
                result = await learn(learner, request, run.keep_failed_batch)  # the student moves
                jumped = await extrapolation.after_step(learner.access, score, run.step + 1)  # and may jump ahead along its path
                if jumped:
                    learner.version += 1  # other weights
                    stream.refresh()  # ask again what is in flight
                await publish(run.step + 1)  # everyone learns of it
                run.advance(result, groups, learner, teachers, jumped, score.take())  # step += 1; metrics, staleness, shares, costs
                if run.due("eval"):
                    await stream.settle()  # an evaluation may lend the sampler averaged weights: no attempt is drawn with those
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
async def open_parts(cfg: RunConfig, context: Callable[[str], PartContext], services: Services) -> AsyncIterator[Parts]:
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
        extrapolation = await stack.enter_async_context(extrapolations.opened(cfg.extrapolation, context, services))
        objective_teachers = {objective.teacher for objective in cfg.objectives if objective.teacher}
        yield learner, sampler, reward, Teachers(opened, context("learner").requirements, services, objective_teachers), extrapolation
