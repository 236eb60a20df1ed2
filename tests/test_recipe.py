"""A recipe is used or refused: every mistake has its sentence, and what is resolved reads back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import MODEL, raw_recipe, run, section, with_teacher

from kdrl.config import Config
from kdrl.errors import UserError
from kdrl.explain import deviations, explain_objective
from kdrl.models import ModelConfig, NewModel, NewTokenizer, load_model
from kdrl.objectives.terms import TERMS
from kdrl.pairing import check_lengths, check_pairing
from kdrl.recipe import Recipe, describe_fields, load_recipe, plain
from kdrl.teachers.combined import CombinedConfig
from kdrl.teachers.config import TeacherConfig
from kdrl.yamls import load_yaml


def refused(raw: Any, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(raw, overrides)
    return str(caught.value)


BASE: dict[str, Any] = {"method": "kdrl", "student": {"model": "s"}, "teacher": {"model": "t"}, "task": {"path": "d"}}


# ---- keys


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stepz": 5}, "stepz is no recipe key; did you mean 'steps'?"),
        ({"rollout": {"grup": 5}}, "rollout.grup is no recipe key; did you mean 'group'?"),
        ({"max_new_tokens": 5}, "max_new_tokens is no recipe key; did you mean rollout.max_new_tokens?"),
        ({"task": {"path": "d", "group": 5}}, "task.group is no recipe key; did you mean rollout.group?"),
        ({"lr": 5}, "lr is no recipe key; did you mean optimizer.lr?"),
        ({"student": {"model": "s", "lora": {"rnk": 2}}}, "student.lora.rnk is no recipe key; did you mean 'rank'?"),
        ({"steps": "many"}, "steps: Input should be a valid integer"),
        ({"rollout": {"group": 0}}, "rollout.group: Input should be greater than or equal to 1 (given: 0)"),
        ({"student": {}}, "student.model is missing"),
        ({"source": "gould"}, "source: no source is called 'gould'; did you mean 'gold'?"),
        ({"objective": [{"distil": {}}]}, "no objective term is called 'distil'; did you mean 'distill'?"),
        ({"objective": [{"distill": {"wieght": 1}}]}, "distill.wieght is no recipe key; did you mean 'weight'?"),
        (
            {"objective": [{"policy_gradient": {"clip": {"hihg": 1}}}]},
            "policy_gradient.clip.hihg is no recipe key; did you mean 'high'?",
        ),
        ({"objective": [{"distill": {"mask": "wrong_respons"}}]}, "did you mean 'wrong_response'?"),
        ({"objective": [{"distill": {"weight": {"liner": {}}}}]}, "did you mean 'linear'?"),
        ({"objective": [{"distill": {}, "entropy": {}}]}, "an objective entry is one term with its settings"),
        ({"objective": [{"distill": "full"}]}, "distill: Input should be a valid dictionary"),
        (
            {"objective": {"distill": {"weight": 2}, "entropy": {}}},
            "objective: the terms are a list with one entry each, as [{distill: {...}}, {entropy: {...}}], not",
        ),
        ({"objective": "distill"}, "objective: the terms are a list, as [distill] or [{distill: {...}}]"),
        (
            {"objective": [{"distill": {"support": {"token": {"estimator": "k3", "as": "loss"}}}}]},
            "k3 differentiated as a loss descends the forward KL",
        ),
        ({"method": "kdlr"}, "did you mean 'kdrl'?"),
        ({"deviations": {"kdlr": {}}}, "did you mean 'kdrl'?"),
        ({"deviations": {"kdrl": 5}}, "deviations maps a method to dotted keys"),
        ({"plugins": 5}, "plugins is a list of Python files or modules, not 5"),
        ({"method": None}, "the recipe has no objective: name a method"),
    ],
)
def test_a_mistake_has_its_sentence(change: dict[str, Any], words: str):
    assert words in refused(BASE | change)


def test_all_mistakes_are_told_at_once():
    said = refused(BASE | {"stepz": 1, "seeds": 2})
    assert "stepz" in said
    assert "seeds" in said


def test_the_file_is_named_and_in_yaml_the_line(tmp_path: Path):
    path = tmp_path / "my.yaml"
    assert f"no recipe at {path}" in refused(path)
    for text, words in [
        ("steps: 1\nsteps: 2\n", f"{path}, line 2 is not YAML: key 'steps' stands twice"),
        ("steps: 1\ntask: {a: b\nseed: 1\n", f"{path}, line 3 is not YAML"),
        ("- 1\n", f"{path} is not a recipe: it must be a mapping"),
        ("", f"{path} is not a recipe"),
        ("stepz: 1\nmethod: grpo\n", f"{path} is not a valid recipe"),
    ]:
        path.write_text(text)
        assert words in refused(path)
    path.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refused(path)


def test_yaml_reads_numbers_and_on_as_people_write_them():
    got = load_yaml("a: 5e-4\nb: 1.5e3\nc: -1E-2\non: [student]\nd: off\ne: true\nf: 1_000e0", "x")
    assert got == {"a": 5e-4, "b": 1500.0, "c": -0.01, "on": ["student"], "d": "off", "e": True, "f": 1000.0}
    assert load_yaml("a: {<<: {b: 1}, c: 2}", "x") == {"a": {"b": 1, "c": 2}}


# ---- overrides


TWO = {"method": None, "objective": [{"distill": {"weight": 1}}, "policy_gradient", {"distill": {"weight": 2}}]}


def test_overrides_reach_sections_terms_and_indices():
    recipe = load_recipe(
        BASE,
        ["objective.distill.weight=0.5", "rollout.group=3", "optimizer.lr={cosine: {from: 1e-3, to: 0}}", "steps=7"],
    )
    weights = {entry.name: entry.config.weight.spec for entry in recipe.objective}
    assert weights == {"policy_gradient": 1.0, "distill": 0.5}
    assert (recipe.rollout.group, recipe.steps) == (3, 7)
    assert recipe.optimizer.lr(0, 10) == pytest.approx(1e-3)
    two = load_recipe(BASE | TWO, ["objective.2.weight=5", "objective.policy_gradient.ratio=none"])
    assert [entry.config.weight.spec for entry in two.objective] == [1, 1.0, 5]
    assert getattr(two.objective[1].config, "ratio") == "none"  # noqa: B009


def test_the_method_and_the_objective_can_be_chosen_on_the_command_line():
    recipe = load_recipe(BASE, ["method=gspo"])
    assert (recipe.method, recipe.optimizer.minibatches) == ("gspo", 4)
    listed = load_recipe(BASE, ["objective=[{entropy: {}}, {distill: {weight: 3}}]", "objective.entropy.weight=0.1"])
    assert [(e.name, e.config.weight.spec) for e in listed.objective] == [("entropy", 0.1), ("distill", 3)]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("steps", "'steps' is no override; write key=value"),
        ("=5", "is no override"),
        ("objective.distill.weight=1", "the objective has 2 terms 'distill'; say which one with objective.0 or"),
        ("objective.entropy.weight=1", "objective.entropy does not exist; the objective's terms are distill, policy"),
        ("objective.7.weight=1", "objective.7 does not exist; the objective has 3 terms, from 0"),
        ("objective.policy_gradient=3", "needs a setting after the term"),
        ("steps.x=3", "steps.x cannot be set, because steps is 5 and not a mapping"),
        ("rollout.grup=3", "did you mean 'group'?"),
        ("task.path=[", "the value of task.path, line 1 is not YAML"),
        ("student.model.layers=3", "student.model is 's' and not a mapping"),
    ],
)
def test_overrides_that_fit_nothing_are_refused(override: str, words: str):
    assert words in refused(BASE | TWO | {"steps": 5}, override)


def test_an_override_of_a_term_that_is_no_mapping_is_refused():
    assert "is 'full' and not a mapping" in refused(BASE | {"objective": [{"distill": "full"}]}, "objective.0.weight=1")


# ---- deviations


def test_a_recipe_deviates_for_its_own_method_only_and_says_so():
    given = BASE | {"deviations": {"kdrl": {"objective.distill.weight": 0.5}, "opd": {"rollout.group": 2}}}
    recipe = load_recipe(given)
    assert deviations(recipe) == ["objective.distill.weight: 0.002 -> 0.5"]
    assert "deviations from the published method:\n  objective.distill.weight: 0.002 -> 0.5" in explain_objective(
        recipe
    )
    assert deviations(load_recipe(given, ["method=opd"])) == ["rollout.group: 4 -> 2"]
    over = load_recipe(given, ["objective.distill.weight=0.7"])
    assert deviations(over) == ["objective.distill.weight: 0.002 -> 0.7"], "the command line has the last word"


def test_other_terms_and_other_settings_are_deviations():
    assert deviations(load_recipe(BASE | {"objective": [{"entropy": {}}]})) == [
        "objective terms: policy_gradient, distill -> entropy"
    ]
    changed = load_recipe(BASE, ["objective.distill.mask=wrong_group", "source=student", "rollout.group=5"])
    assert deviations(changed) == ["objective.distill.mask: all -> wrong_group", "rollout.group: 8 -> 5"]
    mixed = load_recipe(BASE | {"method": "gkd"}, ["source={mixture: 0.3}"])
    assert deviations(mixed) == ["source.mixture.share: 0.5 -> 0.3"]


# ---- reading back


@pytest.mark.parametrize(
    "change",
    [
        {"student": {"model": "s", "lora": {"rank": 3, "target_modules": ["q_proj"]}}},
        {"optimizer": {"clip": None, "lr": {"wsd": {"peak": 1e-3, "warmup": 3}}, "betas": [0.8, 0.9]}},
        {"task": {"path": ["a", "b"], "reasoning_tag": None, "extract": {"after": "#"}, "verifier": {"name": "math"}}},
        {"objective": [{"distill": {"clamp": None, "support": {"token": "k2"}, "mask": [{"not": "truncated"}]}}]},
        {"objective": [{"policy_gradient": {"ratio": {"alpha": 0.3, "clamp": None}, "reduce": {"constant": 7}}}]},
        {"objective": [{"policy_gradient": {"clip": {"kind": "none"}, "advantage": {"baseline": "batch_mean"}}}]},
        {"objective": [{"distill": {"divergence": {"jsd": {"beta": 0.1, "scale": "paper"}}, "support": {"topk": 3}}}]},
        {"objective": ["entropy", {"distill": {"weight": {"cosine": {"from": 1, "to": 0}, "warmup": 2}}}]},
        {"source": {"mixture": {"share": 0.2, "other": "teacher"}}, "method": "gkd"},
        {"evaluate": {"every": 3, "samples": 4, "temperature": 1.0, "k": [2]}, "checkpoint": {"every": 0}},
        {"student": section(tie_embeddings=False, settings={"rope_theta": 100.0}), "rollout": {"stop": ["\n\n", "é"]}},
    ],
)
def test_what_is_resolved_reads_back(change: dict[str, Any]):
    recipe = load_recipe(BASE | change)
    back = load_recipe(load_yaml(recipe.to_yaml(), "stored"))
    assert plain(back) == plain(recipe)
    assert back.to_yaml() == recipe.to_yaml()


def test_a_null_that_means_something_survives():
    recipe = load_recipe(BASE, ["optimizer.clip=null", "objective.distill.clamp=null", "task.reasoning_tag=null"])
    back = load_recipe(load_yaml(recipe.to_yaml(), "stored"))
    assert back.optimizer.clip is None
    assert getattr(back.objective[1].config, "clamp") is None  # noqa: B009
    assert back.task.reasoning_tag is None


def test_a_recipe_is_frozen():
    from pydantic import ValidationError

    with pytest.raises(ValidationError):
        load_recipe(BASE).steps = 3  # type: ignore[misc]


# ---- documentation


def sections(kind: type[Config] = Recipe, prefix: str = "") -> list[tuple[str, type[Config]]]:
    from kdrl.recipe import _section

    found = [(prefix, kind)]
    for name, field in kind.model_fields.items():
        inner = _section(field.annotation)
        if inner is not None:
            found += sections(inner, f"{prefix}{name}.")
    return found


def test_every_key_is_documented():
    rows = {name: text for name, _, text in describe_fields()}
    for prefix, kind in sections():
        for name in kind.model_fields:
            assert len(rows[prefix + name]) > 10, prefix + name
    wanted = {"student.model.layers", "student.lora.rank", "teacher.model", "task.verifier.timeout_s", "optimizer.lr"}
    assert wanted <= rows.keys()


def test_every_setting_of_a_term_is_documented():
    for name in ("policy_gradient", "distill", "cross_entropy", "reference_kl", "entropy"):
        for key, field in TERMS.get(name).Config.model_fields.items():
            assert field.description, f"{name}.{key}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"teacher": {"rout": {"by": "a", "to": {"b": "c"}}}}, "teacher.rout is no recipe key; did you mean 'route'?"),
        ({"teacher": {"averge": {}, "model": "x"}}, "teacher.averge is no recipe key; did you mean 'average'?"),
        ({"teachers": {"A": {"bests": {}}}}, "teachers.A: bests is no recipe key; did you mean 'best'?"),
        ({"teachers": {"A": {"modle": "x"}}}, "teachers.A: modle is no recipe key; did you mean 'model'?"),
        ({"teacher": {"route": {"bye": "a", "to": {"b": "c"}}}}, "teacher: route.bye is no recipe key; did you mean"),
        (
            {"student": {"model": {"architecture": "qwen3", "hiden_size": 3, "layers": 2, "heads": 2}}},
            "student.model.hiden_size is no recipe key; did you mean 'hidden_size'?",
        ),
    ],
    ids=str,
)
def test_a_mistyped_key_has_the_nearest_one_of_any_kind_of_its_section(world: Path, change: dict[str, Any], words: str):
    raw = raw_recipe(world, "kdrl")
    raw.pop("teacher", None)
    with pytest.raises(UserError) as refused:
        load_recipe(raw | change)
    first, *lines = str(refused.value).splitlines()[1:]
    assert words in first, "before what is missing for its sake"
    assert "valid string" not in "".join([first, *lines])


def test_the_other_kind_of_a_teacher_has_those_keys():
    assert set(TeacherConfig.others) == set(CombinedConfig.model_fields)


# ---- pairings of the recipe (kdrl/checks.py)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optimizer": {"lr": -1e-3}}, "optimizer.lr is -0.001 at one end of the run"),
        ({"optimizer": {"lr": {"linear": {"from": 1e-3, "to": -1.0}}}}, "at one end of the run"),
        ({"optimizer": {"betas": [1.5, 0.9]}}, "optimizer.betas.0: Input should be less than 1"),
        ({"teacher": None}, "there is no teacher, but the distill term asks it; add teacher.model="),
        ({"teacher": None, "method": "sft", "source": "teacher"}, "there is no teacher, but the source has it write"),
        ({"rollout": {"top_p": 0.9}}, "rollout.top_p and rollout.top_k cut the policy's distribution"),
        ({"rollout": {"top_k": 5}}, "accept the bias by rollout.filtered=true"),
        ({"rollout": {"filtered": True}}, "rollout.filtered=true has nothing to allow"),
        (
            {"method": "sft", "rollout": {"dynamic_sampling": 2}},
            "resamples the student, who writes nothing under source gold",
        ),
        ({"method": "opd", "rollout": {"dynamic_sampling": 2}}, "but no policy_gradient term uses rewards"),
        (
            {"method": "sft", "source": "student"},
            "objective.cross_entropy reads responses of gold, teacher, but source student writes only student",
        ),
        ({"method": "grpo", "source": "gold"}, "objective.policy_gradient reads responses of student, but source gold"),
        (
            {
                "objective": [{"policy_gradient": {"on": ["student", "gold"]}}],
                "source": {"mixture": 0.5},
            },
            "objective.policy_gradient is a gradient of the student's own samples",
        ),
        ({"method": "grpo", "rollout": {"group": 1}}, "a group of one response has no group baseline"),
        (
            {
                "objective": [{"policy_gradient": {"advantage": {"baseline": "none", "scale": "group_std"}}}],
                "rollout": {"group": 1},
            },
            "a group of one response has no standard deviation",
        ),
        (
            {"method": "opd", "source": {"mixture": 0.5}},
            "objective.distill estimates a KL from the student's own samples; on gold text",
        ),
        (
            {"objective": [{"reference_kl": {"on": ["gold"]}}], "source": "gold"},
            "objective.reference_kl estimates a KL from the student's own samples",
        ),
        (
            {"objective": [{"distill": {"teacher": "self", "on": ["privileged"]}}, {"entropy": {}}]},
            "objective.distill reads responses of privileged, but source student",
        ),
        (
            {"objective": [{"distill": {"teacher": "self"}}]},
            "the live student without more context is",
        ),
        ({"method": "sft", "rollout": {"temperature": 0.7}}, "cross_entropy is the likelihood at temperature 1"),
        (
            {"method": "sft", "objective": [{"cross_entropy": {"mask": {"top_entropy": 0.5}}}]},
            "student's own rollouts; set on: [student]",
        ),
        ({"objective": [{"distill": {"mask": {"top_entropy": 2}}}]}, "top_entropy takes a share of tokens"),
        ({"objective": [{"distill": {"clamp": 3.0, "support": "full"}}]}, "clamp bounds a sampled-token ratio"),
    ],
)
def test_pairings_that_cannot_work_are_refused(change: dict[str, Any], words: str):
    assert words in refused(BASE | change)


def test_pairings_that_work_are_not_refused():
    for change in (
        {"rollout": {"top_p": 0.9, "filtered": True}},
        {"objective": [{"policy_gradient": {"advantage": "reinforce"}}], "rollout": {"group": 1}},
        {"objective": [{"distill": {"on": ["student", "gold"]}}], "source": {"mixture": 0.5}},
        {"method": "opd", "objective": [{"distill": {"support": "full"}}], "source": "gold"},
        {"method": "dapo"},
    ):
        load_recipe(BASE | change)


# ---- pairings of models (kdrl/pairing.py)


def model(characters: str = "0123", **change: Any) -> Any:
    given = {k: change.pop(k) for k in ("chat_template", "eos") if k in change}
    config = ModelConfig(model=NewModel(**(MODEL | change)), tokenizer=NewTokenizer(characters=characters), **given)
    return load_model(config, "cpu", trainable=False, seed=0)


def test_models_of_one_tokenizer_pair_without_a_note():
    assert check_pairing(model(), model(hidden_size=32)) == []


def test_another_tokenizer_is_refused_and_the_tokens_named():
    with pytest.raises(UserError, match=r"2 tokens differ \(such as '3', '4'\).*kdrl generate, then source traces"):
        check_pairing(model("0123"), model("0124"))
    with pytest.raises(UserError, match="another tokenizer"):
        check_pairing(model("0123"), model("0132"))


def test_another_end_is_refused():
    with pytest.raises(UserError, match=r"end a response differently \(<eos> and 3\).*Set teacher.eos or student.eos"):
        check_pairing(model(), model(eos=["3"]))


def test_what_is_only_worth_a_note_is_noted():
    notes = check_pairing(model(), model(eos=["3", "<eos>"], chat_template="{{ messages }}"))
    assert any("share only some end tokens" in note and "skip_eos" in note for note in notes)
    assert any("chat template differs" in note for note in notes)
    padded = model()
    padded.model.resize_token_embeddings(64)
    assert check_pairing(model(), padded) == ["vocabulary rows 6 and 64 are both cut to the tokenizer's 6"]


def test_a_context_too_short_is_refused(world: Path, tmp_path: Path):
    raw = raw_recipe(world, "kdrl", rollout={"max_new_tokens": 123}, **with_teacher(world))
    with pytest.raises(UserError, match=r"reads at most 128 tokens, but a prompt of 8 .*of 123 make 131; lower"):
        run(raw, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_privileged_prompt_counts_for_the_context(world: Path, tmp_path: Path):
    template = "{prompt}" + "the answer is " * 9 + "{answer}"
    raw = raw_recipe(world, "hdpo", source={"privileged": {"template": template}})
    with pytest.raises(UserError, match="reads at most 128 tokens, but a prompt of 13"):
        run(raw, tmp_path / "run")
    raw = raw_recipe(world, "hdpo")  # its own template needs letters that this tokenizer lacks
    with pytest.raises(UserError, match="the tokenizer cannot write"):
        run(raw, tmp_path / "run")


def test_lengths_of_a_teacher_count_too(world: Path):
    recipe = load_recipe(raw_recipe(world, "grpo", rollout={"max_new_tokens": 20}))
    short = model("0123", max_positions=21)
    from tiny import problem

    with pytest.raises(UserError, match="the teacher reads at most 21 tokens, but a prompt of 3"):
        check_lengths({"student": model(), "teacher": short}, [problem(prompt="012")], recipe)


# ---- plugins


def test_a_plugin_adds_terms_masks_and_schedules(world: Path, tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "import kdrl\n\n\n"
        "@kdrl.register_term('shout')\ndef shout(view, loudness=2.0):\n    return -loudness * view.logq_N\n\n\n"
        "@kdrl.register_mask('short')\ndef short(context):\n    return ~context.truncated_B\n\n\n"
        "@kdrl.register_schedule('halving')\ndef halving(step, total, start):\n    return start * 0.5**step\n"
    )
    term = {"shout": {"loudness": 3.0, "mask": "short", "weight": {"halving": {"start": 4}}}}
    raw = raw_recipe(world, None, objective=[term], plugins=[str(tmp_path / "mine.py")])
    run(raw, tmp_path / "run")
    from tiny import rows_of

    assert [row["weight/shout"] for row in rows_of(tmp_path / "run")] == [4, 2]
    raw["objective"] = [{"shout": {"loudnes": 3.0}}]
    assert "did you mean 'loudness'?" in refused(raw)
    assert load_recipe(raw | {"objective": ["shout"], "plugins": str(tmp_path / "mine.py")}).plugins


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "does not exist; paths are relative to where kdrl runs"),
        ("1/0", "cannot be imported: ZeroDivisionError"),
        ("def", "cannot be imported: SyntaxError"),
        ("import kdrl\n@kdrl.register_term('distill')\ndef f(view):\n    return 0", "'distill' is built in"),
    ],
)
def test_a_plugin_that_fails_is_named(tmp_path: Path, text: str | None, words: str):
    path = tmp_path / "p.py"
    if text is not None:
        path.write_text(text)
    assert words in refused(BASE | {"plugins": [str(path)]})
    assert "plugin 'kdrl_no_such_thing' of the recipe cannot be imported" in refused(
        BASE | {"plugins": ["kdrl_no_such_thing"]}
    )


def test_the_recipes_that_ship_are_valid():
    paths = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
    assert len(paths) >= 3
    for path in paths:
        # The recipe for one's own model leaves to the command line what only its user knows.
        own = ["student.model=a", "teacher.model=b", "task.path=data.jsonl"] if path.name == "kdrl.yaml" else []
        recipe = load_recipe(path, own)
        assert recipe.objective
        assert plain(load_recipe(load_yaml(recipe.to_yaml(), "stored"))) == plain(recipe)


def test_the_second_of_two_terms_is_reached_as_metrics_name_it():
    raw = BASE | {"objective": [{"policy_gradient": {}}, {"distill": {}}, {"distill": {"support": {"topk": 2}}}]}
    recipe = load_recipe(raw, ["objective.distill.1.weight=0.25", "objective.distill.0.weight=0.5"])
    assert [entry.config.weight.spec for entry in recipe.objective] == [1.0, 0.5, 0.25]


@pytest.mark.parametrize("mask", ["wrong_response", {"not": "right_response"}])
def test_a_mask_of_verdicts_on_gold_text_is_refused(mask: Any):
    raw = BASE | {"source": "gold", "objective": [{"cross_entropy": {"mask": mask}}]}
    with pytest.raises(UserError, match="gold text is right by definition"):
        load_recipe(raw)
