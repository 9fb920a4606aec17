"""Explain a recipe's batch arithmetic in words and numbers: what ``dteframe plan`` prints."""

from __future__ import annotations

from dataclasses import dataclass

from dteframe.memory import MemoryPlan, StageMemory, in_words
from dteframe.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Workload:
    """What a recipe asks for; every count is a number of its unit, per step, per plan or in all."""

    name: str
    max_steps: int
    num_plans: int
    """Selection rounds of the run."""
    selection_interval: int
    """Steps that one plan serves (mu)."""
    questions_per_step: int
    """Groups that a step learns from (B)."""
    asked_at_first: int
    """Questions that a step asks in its first round, without replay: more where the selector's review rejects
    some."""
    asked_at_most: int
    """Questions that a step asks if all of its rounds ask as many as the first."""
    num_generations: int
    """Completions per question (G)."""
    completions_per_step: int
    """Completions that a step learns from."""
    num_fresh: int
    """Groups of a step that are generated, once the replay buffer holds enough."""
    num_replayed: int
    """Groups of a step that are replayed, once the buffer holds enough."""
    reused_references_per_plan_at_most: int
    """Reference groups that can be trained on as fresh ones: as many as a plan's first step holds."""
    num_minibatches: int
    num_iterations: int
    optimizer_steps_per_step: int
    references_per_plan: int
    """Reference questions rolled out before a plan (K)."""
    reference_rollouts_per_plan: int
    fresh_rollouts_per_plan: int
    """Completions that a plan's steps generate, references not counted, once replay runs."""
    reference_share_without_reuse: float
    """Reference rollouts over all rollouts for training, once replay runs and if no reference is reused."""
    rollout_work: float
    """Rollouts relative to plain GRPO of the same batch: fresh share + K / (mu B); no reference reused."""
    rollout_work_at_least: float
    """The same if as many references are reused as the first step of a plan can hold."""
    selected_per_plan_at_most: int
    """Questions that the selector is asked for: all of a plan's steps, without replay."""
    break_even_informative_fraction: float | None
    """Share of uniformly drawn groups that are informative above which selection can hardly pay; None where
    nothing is estimated."""
    evaluations: int
    """Evaluations of the run, the one before the first step and the one after the last included."""
    questions_per_evaluation_at_most: int
    rollouts_per_evaluation_at_most: int
    total_optimizer_steps: int
    total_reference_rollouts: int
    total_fresh_rollouts_at_least: int
    """If replay runs from the second plan on and as many references are reused as possible."""
    total_fresh_rollouts_at_most: int
    """If nothing is ever replayed or reused."""
    total_replayed_groups_at_most: int
    """If replay runs from the second plan on."""
    total_evaluation_rollouts_at_most: int
    max_prompt_length: int
    max_completion_length: int
    generated_tokens_per_step_at_most: int
    """Completions of a step without replay, each of the full length."""
    generated_tokens_at_most: int
    """All rollouts of the run, evaluations and references included, each of the full length."""
    tokens_at_most: int
    """The same with the prompt of each completion, as long as prompts may be."""
    forward_tokens_per_step_at_most: int
    """Prompt and completion tokens that go through the model with gradient in a step, over all iterations."""


def workload(recipe: Recipe) -> Workload:
    """Count everything that a recipe asks for.

    Source: the cost model is method.md 9.5: rollout work relative to GRPO is delta + K / (mu B).
    """
    arithmetic, training, objective = recipe.arithmetic(), recipe.training, recipe.objective
    steps, interval = arithmetic.max_steps, arithmetic.selection_interval
    generations, asked = arithmetic.num_generations, arithmetic.questions_per_step
    asked_at_most = arithmetic.num_asked(asked) * recipe.selector.rounds_per_step()
    fresh, replayed, references = arithmetic.num_fresh, arithmetic.num_replayed, arithmetic.reference_size
    first = arithmetic.num_asked(fresh)
    num_plans = -(-steps // interval)
    reusable = min(references, fresh) if training.reuse_references else 0
    steps_with_replay = max(steps - interval, 0) if replayed else 0
    in_first_plan = min(references, asked) if training.reuse_references else 0
    fewest_fresh = (steps * asked - steps_with_replay * replayed) - (
        in_first_plan + (num_plans - 1) * reusable
    )
    evaluations = 0
    if training.evaluate_every:
        evaluations = 1 + steps // training.evaluate_every + (steps % training.evaluate_every > 0)
    per_evaluation = training.evaluation_size * training.num_generations_eval
    most_rollouts = steps * asked_at_most * generations + num_plans * references * generations
    most_rollouts += evaluations * per_evaluation
    length, prompt = arithmetic.max_completion_length, arithmetic.max_prompt_length
    optimizer_steps = objective.num_minibatches * objective.num_iterations
    plan_groups = interval * asked
    return Workload(
        name=recipe.name,
        max_steps=steps,
        num_plans=num_plans,
        selection_interval=interval,
        questions_per_step=asked,
        asked_at_first=arithmetic.num_asked(asked),
        asked_at_most=asked_at_most,
        num_generations=generations,
        completions_per_step=asked * generations,
        num_fresh=fresh,
        num_replayed=replayed,
        reused_references_per_plan_at_most=reusable,
        num_minibatches=objective.num_minibatches,
        num_iterations=objective.num_iterations,
        optimizer_steps_per_step=optimizer_steps,
        references_per_plan=references,
        reference_rollouts_per_plan=references * generations,
        fresh_rollouts_per_plan=interval * first * generations,
        reference_share_without_reuse=references / (references + interval * first),
        rollout_work=(interval * first + references) / plan_groups,
        rollout_work_at_least=(interval * first + references - reusable) / plan_groups,
        selected_per_plan_at_most=arithmetic.questions_per_plan,
        break_even_informative_fraction=(
            None
            if recipe.estimator.type == "none"
            else arithmetic.break_even(reuses_references=training.reuse_references)
        ),
        evaluations=evaluations,
        questions_per_evaluation_at_most=training.evaluation_size if evaluations else 0,
        rollouts_per_evaluation_at_most=per_evaluation if evaluations else 0,
        total_optimizer_steps=steps * optimizer_steps,
        total_reference_rollouts=num_plans * references * generations,
        total_fresh_rollouts_at_least=arithmetic.num_asked(fewest_fresh) * generations,
        total_fresh_rollouts_at_most=steps * asked_at_most * generations,
        total_replayed_groups_at_most=steps_with_replay * replayed,
        total_evaluation_rollouts_at_most=evaluations * per_evaluation,
        max_prompt_length=prompt,
        max_completion_length=length,
        generated_tokens_per_step_at_most=asked_at_most * generations * length,
        generated_tokens_at_most=most_rollouts * length,
        tokens_at_most=most_rollouts * (prompt + length),
        forward_tokens_per_step_at_most=asked * generations * (prompt + length) * objective.num_iterations,
    )


def plan_text(work: Workload) -> str:
    """Word the counts, section by section: a step, a plan, the whole run."""
    sections = [
        (f"{work.name}: {_count(work.max_steps, 'step')}, {_count(work.num_plans, 'plan')}", []),
        ("a step", _step_lines(work)),
        (f"a plan ({_count(work.selection_interval, 'step')})", _plan_lines(work)),
        ("in all", _total_lines(work)),
        ("rollouts relative to plain GRPO", _comparison_lines(work)),
    ]
    if work.evaluations:
        sections.insert(3, ("an evaluation", _evaluation_lines(work)))
    lines = []
    for title, rows in sections:
        lines += [title, *(f"  {label:<22}{text}" for label, text in rows)]
    return "\n".join(lines)


def memory_text(memory: MemoryPlan | None, device_bytes: int | None) -> str:
    """Word what every process takes, stage by stage, and what the device has.

    Args:
        memory: None where the model's sizes are unknown.
        device_bytes: memory of the device, if it is known.
    """
    if memory is None:
        return "memory: unknown until the model is in a folder or in the hub's cache (`hf download MODEL`)"
    of_several = f", one of {memory.num_processes}" if memory.num_processes > 1 else ""
    lines = [f"memory of a process{of_several}: {_parameters(memory)}"]
    rows = [(stage.name, _stage_text(stage)) for stage in memory.stages]
    longest = f"{_count(memory.micro_batch_rows, 'row')} of {memory.micro_batch_row_length:,} tokens"
    rows.insert(0, ("longest micro-batch", longest))
    peak = f"{in_words(memory.peak_bytes)}, in {memory.peak_stage}"
    if device_bytes is not None:
        verdict = "does not fit" if memory.peak_bytes > device_bytes else "fits"
        peak += f"; {verdict} into {in_words(device_bytes)}"
    rows += [("peak", peak), *(("note", remark) for remark in memory.remarks)]
    return "\n".join([*lines, *(f"  {label:<22}{text}" for label, text in rows)])


def _parameters(memory: MemoryPlan) -> str:
    every = _count(memory.num_parameters, "parameter")
    if memory.num_trained == memory.num_parameters:
        return every
    return f"{every}, {memory.num_trained:,} of them trained"


def _stage_text(stage: StageMemory) -> str:
    parts = ", ".join(f"{part} {in_words(size)}" for part, size in stage.parts.items())
    return f"{in_words(stage.total_bytes)}: {parts}"


def _step_lines(work: Workload) -> list[tuple[str, str]]:
    learns = f"{_count(work.questions_per_step, 'question')} x {work.num_generations} = "
    lines = [("learns from", learns + _count(work.completions_per_step, "completion"))]
    if work.asked_at_most > work.questions_per_step:
        text = (
            f"{_count(work.asked_at_first, 'question')} at first, {work.asked_at_most:,} if every round does"
        )
        lines.append(("asks", f"{text}: the selector reviews what comes back"))
    if work.num_replayed:
        text = f"{work.num_fresh} fresh and {work.num_replayed} replayed groups once the buffer holds enough"
        lines.append(("of these", f"{text}; until then all fresh"))
    passes = f"{_count(work.num_minibatches, 'minibatch', 'minibatches')} x "
    passes += f"{_count(work.num_iterations, 'iteration')} = "
    lines.append(("updates", passes + _count(work.optimizer_steps_per_step, "optimizer step")))
    generated = f"{_count(work.generated_tokens_per_step_at_most, 'token')} "
    lines.append(("generates at most", f"{generated}({work.max_completion_length:,} a completion)"))
    trained = _count(work.forward_tokens_per_step_at_most, "token")
    lines.append(("trains on at most", f"{trained} (prompts of {work.max_prompt_length:,} included)"))
    return lines


def _plan_lines(work: Workload) -> list[tuple[str, str]]:
    lines = [("selects at most", f"{_count(work.selected_per_plan_at_most, 'question')}, all different")]
    if work.references_per_plan:
        references = f"{_count(work.references_per_plan, 'question')} x {work.num_generations} = "
        references += _count(work.reference_rollouts_per_plan, "rollout")
        share = f"{work.reference_share_without_reuse:.0%} of all rollouts for training"
        lines.append(("references", f"{references}, {share} if none is reused"))
    else:
        lines.append(("references", "none"))
    lines.append(("fresh", _count(work.fresh_rollouts_per_plan, "rollout") + _once_replay_runs(work)))
    if work.break_even_informative_fraction is not None:
        share = f"{work.break_even_informative_fraction:.0%}"
        lines.append(
            ("selection can pay", f"while at most {share} of uniformly drawn groups are informative")
        )
    return lines


def _evaluation_lines(work: Workload) -> list[tuple[str, str]]:
    asked = f"{_count(work.questions_per_evaluation_at_most, 'question')} x "
    per_question = work.rollouts_per_evaluation_at_most // max(work.questions_per_evaluation_at_most, 1)
    rollouts = _count(work.rollouts_per_evaluation_at_most, "rollout")
    return [("asks at most", f"{asked}{per_question} = {rollouts}")]


def _total_lines(work: Workload) -> list[tuple[str, str]]:
    least, most = work.total_fresh_rollouts_at_least, work.total_fresh_rollouts_at_most
    fresh = _count(most, "rollout") if least == most else f"{least:,} to {_count(most, 'rollout')}"
    lines = [("optimizer steps", f"{work.total_optimizer_steps:,}"), ("fresh", fresh)]
    if work.references_per_plan:
        lines.append(("references", _count(work.total_reference_rollouts, "rollout")))
    if work.num_replayed:
        lines.append(("replayed at most", _count(work.total_replayed_groups_at_most, "group")))
    evaluated = _count(work.total_evaluation_rollouts_at_most, "rollout")
    evaluations = (
        f"{_count(work.evaluations, 'evaluation')}, at most {evaluated}" if work.evaluations else "none"
    )
    lines.append(("evaluations", evaluations))
    lines.append(("generates at most", _count(work.generated_tokens_at_most, "token")))
    lines.append(("with prompts", f"at most {_count(work.tokens_at_most, 'token')}"))
    return lines


def _comparison_lines(work: Workload) -> list[tuple[str, str]]:
    asked = work.fresh_rollouts_per_plan / work.num_generations / work.selection_interval
    fresh_share = asked / work.questions_per_step
    reference_share = work.references_per_plan / (work.selection_interval * work.questions_per_step)
    parts = f"fresh share {fresh_share:.2f} + references {reference_share:.2f} = {work.rollout_work:.2f}"
    lines = [("generates", parts + _once_replay_runs(work))]
    saved = work.rollout_work - work.rollout_work_at_least
    if saved > 0:
        text = f"{saved:.2f} at most, so {work.rollout_work_at_least:.2f} at least"
        lines.append(("reuse of references", f"saves {text}"))
    elif work.references_per_plan:
        lines.append(("reuse of references", "off: every reference rollout is paid on top"))
    return lines


def _once_replay_runs(work: Workload) -> str:
    return " once replay runs" if work.num_replayed else ""


def _count(number: int, unit: str, units: str | None = None) -> str:
    return f"{number:,} {unit if number == 1 else units or unit + 's'}"
