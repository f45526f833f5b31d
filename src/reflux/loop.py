"""The training loop. The same loop serves every method, synchronous or asynchronous, for texts and
flows.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, closing
from dataclasses import replace
from functools import partial
from typing import Any

from reflux import checks
from reflux.cluster import base as clusters
from reflux.config.context import PartContext
from reflux.config.recipe import RunConfig
from reflux.credit.base import share_credit
from reflux.evals.preflight import Preflight
from reflux.extrapolation import base as extrapolations
from reflux.extrapolation.score import CurrentScore, scorer
from reflux.learners.base import OpenLearner
from reflux.learners.learning import learn, observe
from reflux.loss.step import StepRequest
from reflux.models.torch_settings import crowding, prepare_torch
from reflux.rewards.opened_rewards import Rewards, open_rewards
from reflux.runtime.pipeline import Ask, Attempting, Pipeline
from reflux.runtime.services import Services
from reflux.runtime.signals import stopping_on_signals
from reflux.runtime.timers import Waiting
from reflux.samplers.base import OpenSampler
from reflux.teachers.collection import Teachers
from reflux.training import Options, Run
from reflux.types import Group

Parts = tuple[OpenLearner, OpenSampler, Rewards, Teachers, extrapolations.OpenExtrapolation]


async def train(cfg: RunConfig, options: Options) -> dict[str, Any]:
    """Train a student and return the run's summary (the content of summary.json).

    A step: prompts -> student samples -> rewards -> teachers answer -> credit -> optimiser step -> publish.
    At most `max_staleness` optimiser steps lie between sampling and learning; 0 is strictly on-policy.
    """
    if cfg.learner.follow():
        # Another process runs this loop. This one has held a part of its student.
        return {}
    run = Run.open(cfg, checks.join(cfg), options)
    if run.finished:
        cfg.learner.dismiss()
        with closing(run):
            return run.summary()
    opening = open_parts(cfg, run.context, run.services)
    async with lasting(run), opening as (learner, sampler, rewards, teachers, extrapolation):
        run.restore(learner, rewards, teachers, extrapolation)
        compare = scorer(cfg.extrapolation, run.context, run.services)
        score = CurrentScore(compare, learner, partial(run.evaluation, sampler, teachers))
        await publish(run, learner, sampler, teachers, run.step)
        preflight = Preflight(cfg, run.evaluation(sampler, teachers), learner, teachers, run.dir)
        await preflight()
        # Due before the first step, and after a resume where the evaluation of this step is missing.
        if run.due("eval"):
            await run.evaluate(learner, sampler, teachers)
        async with aclosing(pipeline(run, attempting(run, learner, sampler, rewards, teachers))) as stream:
            async for groups in Waiting(stream, run.services.clock):
                now = run.step_context(version=learner.version)
                await rewards.learn(groups, now)
                # Teachers answer again only where an answer is missing or the context has changed.
                await teachers.score_again(groups, now)
                # The current student's outputs, and the teachers' at its top-k, where a part requires them.
                await observe(learner, groups)
                await teachers.follow_up(groups)
                share_credit(groups, cfg.credit, now)
                if extrapolation.fires(run.step + 1):
                    await stream.settle()
                request = StepRequest(groups, cfg.objectives, now, cfg.loss_aggregation, cfg.log_variance)
                result = await learn(learner, request, run.keep_failed_batch)
                jumped = await extrapolation.after_step(learner.access, score, run.step + 1)
                if jumped:
                    learner.version += 1
                if jumped or run.refreshes.due(groups, run.step):
                    # Prompts in flight are sampled again with the new weights.
                    stream.refresh()
                await publish(run, learner, sampler, teachers, run.step + 1)
                await preflight()
                run.advance(result, groups, learner, teachers, jumped, score.take(), stream.positions)
                if run.due("eval"):
                    if cfg.learner.averages:
                        # The sampler gets the averaged weights. Attempts must not use them.
                        await stream.settle()
                    await run.evaluate(learner, sampler, teachers)
                if run.due("save"):
                    run.save(learner)
                run.stop_if_asked()
        await run.evaluate(learner, sampler, teachers)
        run.save(learner)
    return run.summary()


def attempting(
    run: Run, learner: OpenLearner, sampler: OpenSampler, rewards: Rewards, teachers: Teachers
) -> Attempting:
    """The function that samples, judges and scores the group of one prompt, and writes it to disk."""
    cfg = run.cfg

    async def attempt(ask: Ask) -> Group:
        draw = replace(cfg.draw(ask.step, ask.cohort), completed=run.step)
        # A context that changes during a run is first that of the beginning, which environments have too.
        now = replace(run.step_context(ask.step, learner.version), completed=draw.completed)
        span = partial(run.services.clock.span, "groups", step=ask.step + 1, group=ask.prompt.key)
        with span("group"):
            if ask.recalled or not run.in_flight.begin(ask):
                group = run.in_flight.recall(ask, cfg.group_size)
            else:
                with span("sample"):
                    group = await sampler.sample(ask.prompt, cfg.group_size, draw)
                for each in group:
                    each.asked_step = ask.step
                with span("reward"):
                    await rewards.judge(group)
            with span("teach"):
                await teachers.score([group], now, ask.cohort)
        # Attempts are on disk before anything else can happen to them.
        run.write(ask, group)
        return group

    return attempt


async def publish(
    run: Run, learner: OpenLearner, sampler: OpenSampler, teachers: Teachers, step: int
) -> None:
    """Give the learner's weights to the sampler, and to the teachers that follow the student."""
    with run.services.clock.span("loop", "publish", step=step):
        await sampler.publish(learner.publish(), step)
        await teachers.publish(learner.publish(), step)


def pipeline(run: Run, attempt: Attempting) -> Pipeline:
    """The stream of the groups of all remaining steps. Closing the stream cancels all attempts that still
    run.
    """
    cfg = run.cfg
    return Pipeline(
        run.prompts,
        attempt,
        positions=run.positions,
        steps=cfg.steps,
        per_step=cfg.prompts_per_step,
        max_staleness=cfg.max_staleness,
        ahead=cfg.steps_ahead,
        order=cfg.order,
        recalled=run.in_flight.recalled,
        discard=run.in_flight.discard,
    )


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
    """Open every part, the learner first. The parts are closed in reverse order, also on an error.

    context(name): the context of the part with this key in the recipe.
    """
    async with AsyncExitStack() as stack:
        # It may hide GPUs from this process, so it comes before torch looks for them.
        cluster = await stack.enter_async_context(clusters.opened(cfg.cluster, cfg.learner, services))
        prepare_torch(cfg.threads, cfg.deterministic)
        services.tell(crowding())
        learner = await stack.enter_async_context(cfg.learner.open(context("learner"), services))
        sampler = await stack.enter_async_context(cluster.sampler(cfg.sampler, context("sampler"), services))
        rewards = await stack.enter_async_context(open_rewards(cfg.rewards, context, services))
        opened = {
            name: (
                teacher,
                await stack.enter_async_context(cluster.teacher(teacher, context(name), services)),
            )
            for name, teacher in cfg.teachers.items()
        }
        extrapolation = await stack.enter_async_context(
            extrapolations.opened(cfg.extrapolation, context, services)
        )
        objective_teachers = {objective.teacher for objective in cfg.objectives if objective.teacher}
        yield (
            learner,
            sampler,
            rewards,
            Teachers(opened, context("learner").requirements, services, objective_teachers, cfg.task.replay),
            extrapolation,
        )
