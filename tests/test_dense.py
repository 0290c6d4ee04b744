"""The dense loss against a loop over cells, and what it refuses."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from zoo import registry
from zoo.registry import IGNORE_INDEX, ImageFeatures, ZooError

M, D, GRID = 3, 6, (2, 2)


def student(tokens):
    return SimpleNamespace(image=ImageFeatures(tokens, grid=GRID))


def build(**options):
    node = {"name": "dense", "classes": [3, 5], **options}
    torch.manual_seed(0)
    return registry.build("distiller", node, vision_dim=D, grid=GRID, text_dim=8, vocab_size=9)


def labels():
    result = torch.stack([torch.randint(0, 3, (M, 4)), torch.randint(0, 5, (M, 4))], -1)
    result[0, 1, 1] = IGNORE_INDEX
    result[2, :, 1] = IGNORE_INDEX
    return result


def test_equals_a_loop_over_cells():
    torch.manual_seed(1)
    dense, tokens, given = build(weights=[1.0, 0.5]), torch.randn(M, 4, D), labels()
    loss = dense(student(tokens), None, {"targets": {"patch_labels": given.short()}})["dense"]
    wanted = 0.0
    for i, (start, stop, weight) in enumerate([(0, 3, 1.0), (3, 8, 0.5)]):
        values = [
            F.cross_entropy(dense.head(tokens[m, n])[start:stop], given[m, n, i])
            for m in range(M)
            for n in range(4)
            if given[m, n, i] != IGNORE_INDEX
        ]
        wanted += weight * sum(values) / len(values)
    torch.testing.assert_close(loss, wanted)


def test_reaches_the_encoder_and_ignores_cells_without_a_label():
    tokens = torch.randn(M, 4, D, requires_grad=True)
    given = labels()
    given[1, 2] = IGNORE_INDEX
    build()(student(tokens), None, {"targets": {"patch_labels": given}})["dense"].backward()
    assert tokens.grad[1, 2].abs().sum() == 0
    assert tokens.grad[1, 1].abs().sum() > 0


def test_text_alone_is_no_loss_and_each_image_needs_labels():
    assert build()(SimpleNamespace(image=None), None, {}) == {}
    with pytest.raises(ZooError, match="the batch has 4 images, and labels of 3: a stage that mixes data"):
        build()(student(torch.randn(M + 1, 4, D)), None, {"targets": {"patch_labels": labels()}})


def test_no_label_at_all_is_no_loss():
    given = torch.full((M, 4, 2), IGNORE_INDEX)
    loss = build()(student(torch.randn(M, 4, D)), None, {"targets": {"patch_labels": given}})["dense"]
    assert loss == 0


def test_learns_what_the_tokens_say():
    torch.manual_seed(0)
    kinds = torch.randint(0, 3, (8, 4))
    tokens, given = F.one_hot(kinds, D).float(), torch.stack([kinds, kinds], -1)
    dense = build()
    optimizer = torch.optim.Adam(dense.parameters(), 0.1)
    for _ in range(60):
        optimizer.zero_grad()
        loss = dense(student(tokens), None, {"targets": {"patch_labels": given}})["dense"]
        loss.backward()
        optimizer.step()
    assert loss < 0.1


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({}, "needs the target 'patch_labels' of the data; it gives: none"),
        ({"patch_labels": torch.zeros(M, 9, 2)}, r"2 x 2 = 4 cells; the data gives 9. .*data.scenes.grid=2"),
        ({"patch_labels": torch.zeros(M, 4, 3)}, "names 2 labels per cell; the data gives 3"),
        ({"patch_labels": torch.full((M, 4, 2), 3)}, "Label 0 of a cell is 3, but classes allows 0 to 2"),
    ],
)
def test_refuses_labels_that_do_not_fit(targets, message):
    with pytest.raises(ZooError, match=message):
        build()(student(torch.randn(M, 4, D)), None, {"targets": targets})


@pytest.mark.parametrize(
    ("options", "message"),
    [({"classes": [1]}, "2 or more"), ({"weights": [1.0]}, "as many as classes"), ({"weights": [1.0, -1.0]}, "neg")],
)
def test_refuses_options_that_do_not_fit(options, message):
    with pytest.raises(ZooError, match=message):
        build(**options)


def test_cls_learns_labels_of_the_image():
    """The mean over labels of the loss of the first prefix token, without the cells'."""
    torch.manual_seed(1)
    dense, tokens, prefix = build(cls_classes=[2, 4]), torch.randn(M, 4, D), torch.randn(M, 3, D, requires_grad=True)
    assert dense.needs == {"student.image", "student.prefix", "batch.patch_labels", "batch.scene_labels"}
    whole = torch.tensor([[[0, 3]], [[1, IGNORE_INDEX]], [[1, 0]]])
    view = SimpleNamespace(image=ImageFeatures(tokens, grid=GRID, prefix=prefix))
    given = {"targets": {"patch_labels": labels(), "scene_labels": whole.short()}}
    losses = dense(view, None, given)
    plain = build()
    plain.head.load_state_dict(dense.head.state_dict())
    torch.testing.assert_close(losses["dense"], plain(view, None, given)["dense"])
    logits = dense.cls_head(prefix[:, 0])
    wanted = F.cross_entropy(logits[:, :2], whole[:, 0, 0]) + F.cross_entropy(logits[[0, 2], 2:], whole[[0, 2], 0, 1])
    torch.testing.assert_close(losses["cls"], wanted / 2)
    losses["cls"].backward()
    assert prefix.grad[:, 0].abs().sum(-1).min() > 0 and prefix.grad[:, 1:].abs().sum() == 0
    with pytest.raises(ZooError, match="cls_classes names 3 labels per cell; the data gives 2"):
        build(cls_classes=[2, 2, 2])(view, None, given)
    with pytest.raises(ZooError, match="2 or more"):
        build(cls_classes=[1])


def test_says_what_it_needs():
    assert build(target="cells").needs == {"student.image", "batch.cells"}
