"""Properties of what has many inputs, on inputs that hypothesis draws: schedules, chains, templates."""

import math

from hypothesis import example, given, settings
from hypothesis import strategies as st

from cola_lightning import UserError
from cola_lightning.chain.schedule import ChainSchedule, FitPosition, RunLength
from cola_lightning.data.rows import Row
from cola_lightning.data.templates import Template

KNOTS = st.lists(st.integers(1, 60), min_size=1, max_size=6, unique=True).map(sorted)
PERIODS = st.integers(1, 40)
SCHEDULES = st.one_of(
    st.just({}),
    *(st.fixed_dictionaries({name: PERIODS}) for name in ("every_n_epochs", "every_n_train_steps")),
    *(st.fixed_dictionaries({name: KNOTS}) for name in ("at_epochs", "at_steps")),
)
EPOCHS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def every_step(lengths):
    """The counters before each optimizer step of a run whose epochs have these lengths."""
    return [FitPosition(epoch, sum(lengths[:epoch]) + step) for epoch, n in enumerate(lengths) for step in range(n)]


@given(SCHEDULES, EPOCHS, st.one_of(st.just(math.inf), st.integers(1, 60)))
def test_links_are_those_that_a_run_step_by_step_ties(arguments, lengths, max_steps):
    schedule = ChainSchedule(**arguments)
    run = RunLength(lambda epoch: lengths[epoch], max_epochs=len(lengths), max_steps=max_steps)
    start, sizes = FitPosition(0, 0), [0]
    for now in every_step(lengths)[: int(run.end_step)]:
        if schedule.is_due(start, now):
            assert schedule.link_steps(start, run) == sizes[-1]
            start = now
            sizes.append(0)
        sizes[-1] += 1
    assert schedule.link_lengths(FitPosition(0, 0), run) == sizes


NAMES = st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.text(), NAMES), max_size=5), st.text(), st.data())
def test_a_template_is_its_literals_and_the_fields_as_they_are(parts, end, data):
    row = {name: data.draw(st.text()) for _, name in parts}
    escape = {ord("{"): "{{", ord("}"): "}}"}
    text = "".join(literal.translate(escape) + f"{{{name}}}" for literal, name in parts) + end.translate(escape)
    expected = "".join(literal + row[name] for literal, name in parts) + end
    assert Template(text, "data.prompt").fill(Row(row, "line 1")) == expected


@settings(max_examples=50)
@given(st.text(alphabet="ab{}.[]!: 0"))
@example("{a:d}")
@example("{a!b}")
@example("{a:{b}}")
def test_any_text_is_a_template_or_one_error(text):
    try:
        filled = Template(text, "data.prompt").fill(Row({"a": "x", "b": "y"}, "line 1"))
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert isinstance(filled, str)
