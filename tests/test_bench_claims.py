"""`zoo bench claims`: experiments run, report what they found over seeds, judge it; their data is what they say."""

import copy
import json

import pytest
import torch

from tests.data_places import shared
from zoo.claims import (
    command,
    distill_pruned,
    llava_kd,
    llava_mod,
    mole,
    pool,
    pool_cells,
    pruning,
    pruning_fashion,
    pruning_film,
    vlora,
)
from zoo.claims.command import CLAIMS, Options, experiment
from zoo.claims.experiment import Bound, Experiment, Run, gap, row
from zoo.claims.student import Arm, Scenes
from zoo.cli.bench import main, parse
from zoo.registry import ZooError

BOUNDS = {"pool": 3, "pruning": 5, "pruning_fashion": 4, "pruning_film": 4, "vlora": 3, "mole": 2, "moextend": 4}
BOUNDS |= {"pool_cells": 0, "mole_domains": 0, "moextend_clothes": 1, "vlora_clothes": 1}
BOUNDS |= {"llava_kd_clothes": 8, "llava_mod_clothes": 6, "distill_pruned_clothes": 16}
REAL = {claim: needed for claim in BOUNDS if (needed := experiment(claim).data)}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Rows are kept below the folder that one is in."""
    monkeypatch.chdir(tmp_path)


def judged(claim, runs):
    """Rows of the bounds, by what they say, from rows of several seeds."""
    return {bound.what: bound.row(claim, runs) for bound in experiment(claim).bounds}


@pytest.mark.parametrize(("claim", "bounds"), BOUNDS.items())
def test_a_claim_runs_and_is_judged(claim, bounds, tmp_path, monkeypatch):
    for name in REAL.get(claim, ()):
        monkeypatch.setenv("ZOO_DATA", str(shared(name).parent))
    files = [f"json={tmp_path / 'rows.json'}", f"markdown={tmp_path / 'rows.md'}"]
    seeds = 2 if claim == "vlora" else 1
    assert main(["claims", f"claim={claim}", f"seeds={seeds}", "share=0.005", f"plots={tmp_path}", *files]) == 0
    assert (tmp_path / f"{claim}.png").is_file() == claim.startswith("pruning")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert len([r for r in rows if r["bound"] is not None]) == bounds
    assert all(r["what"].startswith(f"{claim}: ") and r["value"]["low"] <= r["value"]["high"] for r in rows)
    assert "| what | mean | range of seeds | bound | note |" in (tmp_path / "rows.md").read_text()
    if claim == "vlora":
        exact = next(r for r in rows if "to the bit in every run" in r["what"])
        assert exact["reached"]


def test_cells_are_boxed_where_they_are(monkeypatch):
    monkeypatch.setenv("ZOO_DATA", str(shared("bccd").parent))
    batch = pool_cells.Cells(0).draw(200, torch.Generator().manual_seed(0))
    violet = batch["x"][:, 2] - batch["x"][:, 1]  # (n, 64, 64) blue above green: what the stain makes of white cells
    for i in range(200):
        x1, y1, x2, y2 = (8 * batch["box"][i]).tolist()
        inside = torch.zeros(64, 64, dtype=torch.bool)
        inside[y1 : y2 + 8, x1 : x2 + 8] = True
        assert violet[i][inside].mean() > violet[i][~inside].mean() + 0.05


def test_objects_are_where_the_pruning_pictures_say():
    pictures = pruning.Pictures(0)
    batch = pictures.draw(20, torch.Generator().manual_seed(1))
    assert (batch["shown"].sum(1) == 8).all() and (batch["asked"][:, 0] != batch["asked"][:, 1]).all()
    patches = batch["pixels"].unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(20, 64, 48)
    looks = pictures.shapes[:, None] + pictures.colours  # (shape, colour, 48)
    near = torch.cdist(patches, looks.flatten(0, 1)).argmin(-1)  # (n, 64) the pair that a patch is most like
    for i in range(20):
        pairs = {int(s) * 6 + int(c) for s, c in zip(batch["asked"][i], batch["answers"][i], strict=True)}
        assert set(near[i][batch["shown"][i]].tolist()) == pairs


def test_films_show_two_scenes_of_two_objects_and_noise_of_each_frame():
    films = pruning_film.Films(0)
    batch = films.draw(20, torch.Generator().manual_seed(1))
    frames = batch["pixels"]
    assert frames.shape == (20, 4, 3, 32, 32) and all(len(set(s.tolist())) == 4 for s in batch["asked"])
    patches = frames.unfold(3, 4, 4).unfold(4, 4, 4).permute(0, 1, 3, 4, 2, 5, 6).reshape(20, 4, 64, 48)
    look = films.pictures.shapes[batch["asked"]] + films.pictures.colours[batch["answers"]]  # (n, 4, 48)
    near = torch.cdist(patches.flatten(1, 2), look).unflatten(1, (4, 64)) < 6  # noise 0.5 in 48 numbers is 3.4
    assert (near.sum(2) == 9 * torch.tensor([[1, 1, 0, 0]] * 2 + [[0, 0, 1, 1]] * 2)).float().mean() > 0.97
    change = (frames[:, 1:] - frames[:, :-1]).flatten(2).std(2)  # (n, 3)
    assert (change[:, [0, 2]] < 0.6).all() and (change[:, 1] > 0.8).all()


def test_questions_about_clothes_are_half_yes():
    classes = torch.arange(10).repeat(200)
    asked, said = pruning_fashion.questions(classes, torch.Generator().manual_seed(0))
    assert (asked[:, 0] == 10).all() and torch.equal(said[:, 0], classes)
    yes = said[:, 1] == pruning_fashion.YES
    assert torch.equal(yes, asked[:, 1] == classes) and 0.45 < yes.float().mean() < 0.55


@pytest.mark.parametrize("claim", REAL)
def test_a_claim_without_its_data_is_not_run_and_says_so(claim, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ZOO_DATA", str(tmp_path))
    assert main(["claims", f"claim={claim}", f"markdown={tmp_path / 'rows.md'}"]) == 0
    why = f"{claim}: not run: there is no {' and no '.join(REAL[claim])} in {tmp_path}; set ZOO_DATA"
    assert why in capsys.readouterr().out and why in (tmp_path / "rows.md").read_text()


def test_rectangles_are_where_the_boxes_say():
    scenes = pool.Scenes(0)
    batch = scenes.draw(50, torch.Generator().manual_seed(1))
    x = (batch["x"] @ scenes.rotation.T).unflatten(1, (8, 8)) - scenes.code
    near = (x @ scenes.prototypes.T / 4).argmax(-1)  # class of the prototype that a cell is most like
    loud = x.norm(dim=-1) > 2.75
    for i in range(50):
        x1, y1, x2, y2 = batch["box"][i].tolist()
        inside = torch.zeros(8, 8, dtype=torch.bool)
        inside[y1 : y2 + 1, x1 : x2 + 1] = True
        assert loud[i][inside].float().mean() > 0.7
        assert (near[i][inside] == batch["class"][i]).float().mean() > 0.9
        others = set(near[i][loud[i] & ~inside].tolist())
        if batch["there"][i] and batch["asked"][i] != batch["class"][i]:
            assert int(batch["asked"][i]) in others


def test_captions_say_what_the_patch_holds():
    pictures = vlora.Pictures(0)
    image, words = pictures.draw(200, torch.Generator().manual_seed(1))
    x = image.tokens - pictures.places
    patch = x.norm(dim=-1).argmax(1)
    rows, columns = patch // 4, patch % 4
    assert torch.equal(words[:, 3] - 12, 2 * (rows >= 2).long() + (columns >= 2).long())
    left = x[torch.arange(200), patch] - pictures.shapes[words[:, 2] - 6]
    assert ((left @ pictures.colours.T).argmax(1) == words[:, 1]).float().mean() > 0.95
    assert set(words[:, 0].tolist()) == {vlora.BOS} and set(words[:, 4].tolist()) == {vlora.EOS}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("claim=vlroa", "No claim named 'vlroa'. Did you mean 'vlora'"),
        ("seeds=0", "at least 1, got 0"),
        ("share=2", r"share must be in \(0, 1\], got 2"),
    ],
)
def test_what_cannot_be_is_refused(word, message):
    with pytest.raises(ZooError, match=message):
        parse("claims", Options, [word])


def test_every_claim_has_its_file():
    assert all(isinstance(experiment(claim), Experiment) for claim in CLAIMS)


def test_a_bound_is_of_means_of_seeds_or_of_the_least_seed():
    runs = [{"a": 0.9, "b": 0.5}, {"a": 0.5, "b": 0.6}]
    wanted = {"means": (0.15, 0.15, 0.15), "seeds": (0.15, -0.1, 0.4), "least": (-0.1, -0.1, 0.4)}
    for over, (middle, low, high) in wanted.items():
        found = Bound("a above b", gap("a", "b"), at_least=0.1, over=over).row("x", runs)
        assert (found.value.median, found.value.low, found.value.high) == pytest.approx((middle, low, high))
        assert found.reached == (middle >= 0.1)
    assert Bound("a", row("a"), at_most=0.5).row("x", runs).verdict == "bound <= 0.5: MISSED 0.7"
    assert Bound("a", row("a")).row("x", runs).reached is None


def test_llava_mod_is_judged_by_what_it_says():
    worse = {
        f"{name}: {what}": 0.5 for name in ("teacher", *llava_mod.ARMS, *llava_mod.PAIRS) for what in llava_mod.SAID
    }
    found = judged("llava_mod", [worse | {"kto_pair: valid": 0.2}])
    assert [r.reached for r in found.values() if r.bound] == [False, False]
    better = worse | {"sparse, mimic: accuracy": 0.7, "kto_pair, anchor: false positives": 0.1}
    found = {what: r.value.median for what, r in judged("llava_mod", [better]).items()}
    assert found["sparse, accuracy of mimic above answers alone"] == pytest.approx(0.2)
    assert found["kto_pair, anchor, fewer false positives than before"] == pytest.approx(0.4)


def test_other_claims_of_distillation_are_judged_seed_by_seed():
    arms = dict.fromkeys((*llava_kd.ARMS, llava_kd.EQUAL_COMPUTE), 0.5)
    found = judged("llava_kd", [arms | {"PT-SFT-DFT": 0.9}, arms | {"PT-SFT-DFT": 0.4}])
    equal = found["distilled fine-tuning over the control at equal compute"]
    assert equal.reached is False and equal.what.endswith("at equal compute, least of the seeds")
    ways = ("taught with the pruner", "supervised with the pruner", "taught, pruned afterwards")
    kinds = [f"{r}{end}" for end in distill_pruned.POSITIONS.values() for r in distill_pruned.RATIOS]
    rows = {f"{way}, {kind}": 0.5 for way in ways for kind in kinds}
    found = judged("distill_pruned", [rows | {f"{ways[0]}, 0.25": 0.4}])
    assert [r.reached for r in found.values()] == [True, False, True, True] * 2 + [True] * 8


def _rows(words, tmp_path):
    assert main(["claims", *words, f"json={tmp_path / 'rows.json'}"]) == 0
    return json.loads((tmp_path / "rows.json").read_text())["rows"]


def test_a_killed_run_goes_on_behind_its_last_arm_to_the_same_bits(tmp_path, monkeypatch, capsys):
    """Arms of `mole` draw from one stream: what comes behind the gap must begin where the kept arms left it."""
    words = ["claim=mole", "seeds=1", "share=0.002"]
    expected = _rows([*words, "rows="], tmp_path)
    kept = tmp_path / "runs" / "claims" / "mole-0.jsonl"
    assert not kept.parent.exists()
    trained, train = [], mole.train

    def killed(*args, **kwargs):
        trained.append(1)
        if len(trained) == 1 + 4:  # the base, three arms
            raise KeyboardInterrupt
        train(*args, **kwargs)

    monkeypatch.setattr(mole, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        main(["claims", *words])
    with kept.open("a") as file:
        file.write('{"arm": "one upd')  # killed while it wrote a line
    before = len(trained)
    capsys.readouterr()
    assert _rows(words, tmp_path) == expected
    assert len(trained) - before == 1 + 6, "an arm whose rows are kept was trained again"
    assert "mole-0.jsonl: 3 arms are kept" in capsys.readouterr().out
    assert [p.name for p in kept.parent.iterdir()] == ["mole-0.jsonl"]


def test_rows_of_other_options_are_put_aside_and_a_whole_seed_is_not_measured_twice(tmp_path, monkeypatch, capsys):
    measured = []

    def measure(run):
        run.add({"before": 0.1})
        for name, arm in run.arms({"a": 1, "b": 2}):
            measured.append(f"{name}{run.seed}")
            if fails and measured[-1] == "b1":
                raise RuntimeError("killed")
            run.add({name: arm * run.share})

    told = Experiment(("nothing is trained",), measure, (Bound("a below b", gap("b", "a"), at_least=0.0),))
    monkeypatch.setattr(command, "experiment", lambda claim: told)
    fails, words = True, ["claim=pool", "seeds=2"]
    with pytest.raises(RuntimeError, match="killed"):
        main(["claims", *words])
    fails = False
    rows = _rows(["claim=pool", "seeds=1", "first=1", "share=0.5"], tmp_path)
    assert measured == ["a0", "b0", "a1", "b1", "a1", "b1"] and rows[1]["value"]["median"] == 0.5
    assert "of other options" in capsys.readouterr().out
    kept = tmp_path / "runs" / "claims" / "pool-1.other.jsonl"
    assert [json.loads(line).get("arm") for line in kept.read_text().splitlines()[1:]] == [None, "a"]
    kept.replace(kept.with_name("pool-1.jsonl"))
    _rows(words, tmp_path)
    said = capsys.readouterr().out
    assert "pool-0.jsonl: all its rows are kept" in said and "pool-1.jsonl: 1 arms are kept" in said
    assert _rows(words, tmp_path) == _rows(words, tmp_path) and measured[6:] == ["b1"]
    kept.with_name("pool-0.jsonl").unlink()
    _rows(words, tmp_path)
    assert measured[6:] == ["b1", "a0", "b0"]


def test_students_side_by_side_learn_what_each_learns_alone():
    """Two of one teacher, which looks once a step for both, one of them pruned; and one without a teacher."""
    weights, looks = [], []
    train = Scenes(Run(seed=1, share=0.01))
    student, _ = train.student("llava_kd_tiny")
    pruned, processor = train.student("llava_kd_tiny", "pruner=[random]", "pruner.random.keep_ratio=0.5")
    run, kd = train.teacher.teacher.outputs_for, {"name": "llava_kd"}
    for together in (True, False):
        train.teacher.teacher.outputs_for = lambda *args, how=together: looks.append(how) or run(*args)
        arms = [Arm(copy.deepcopy(student), kd), Arm(copy.deepcopy(student)), Arm(copy.deepcopy(pruned), kd, processor)]
        for group in [arms] if together else [[arm] for arm in arms]:
            train(group, train.basics, 2, train=["all"], lr=1e-3)
        weights.append([p for arm in arms for p in arm.model.parameters()])
        assert arms[0].seconds > arms[1].seconds > 0
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert looks == [True] * 2 + [False] * 4
