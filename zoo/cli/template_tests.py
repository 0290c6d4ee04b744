"""The tests that `zoo new` writes beside a component: for each kind the body of a function."""

# NAME is replaced by the component's name.

TESTS = {
    "inside_pruner": """    sizes = {"hidden_size": 32, "num_layers": 3}
    llm = registry.build("llm", {"name": "hf", **sizes}, vocab_size=64)
    ids = torch.arange(8).unsqueeze(0)
    base = llm.lm(input_ids=ids).logits
    pruner = registry.build("pruner", {"name": "NAME"})
    assert pruner.tokens_per_layer(16, 3) == [16, 8, 8]
    pruner.attach(llm)
    assert torch.equal(llm.lm(input_ids=ids).logits, base)  # text alone is left as it is
    pruner.detach()
    assert torch.equal(llm.lm(input_ids=ids).logits, base)
""",
    "layout": """    derived = {"grid": (4, 4), "num_tokens": 16, "image_size": (32, 32)}
    layout = registry.build("layout", {"name": "NAME"}, text_dim=12, **derived)
    counter = registry.build("layout", {"name": "NAME"}, text_dim=None, **derived)
    cuts = [Cut(1, "image", (32, 32)), Cut(3, "crop", (32, 64), (1, 2))]
    out = layout(torch.randn(4, 16, 12), cuts)
    assert out.shape == (sum(counter.count(cut) for cut in cuts), 12)
""",
    "llm": """    llm = registry.build("llm", {"name": "NAME"}, vocab_size=64)
    ids = torch.arange(8).unsqueeze(0)
    hidden = llm.hidden(inputs_embeds=llm.embed(ids)).last_hidden_state
    assert hidden.shape == (1, 8, llm.hidden_size) and len(llm.layers) == llm.num_layers
    assert torch.allclose(llm.head(hidden), llm.lm(input_ids=ids).logits, atol=1e-5)
""",
    "pruner": """    pruner = registry.build("pruner", {"name": "NAME"})
    image = ImageFeatures(torch.randn(2, 16, 8), (4, 4))
    assert pruner(image).tokens.shape == (2, pruner.num_tokens(16), 8)
    keeps_all = registry.build("pruner", {"name": "NAME", "keep_ratio": 1.0})
    assert keeps_all(image).grid == (4, 4) and "grid" not in keeps_all.destroys
""",
    "projector": """    projector = registry.build("projector", {"name": "NAME"}, vision_dim=8, text_dim=12)
    tokens = projector(ImageFeatures(torch.randn(2, 16, 8), (4, 4)))
    assert tokens.shape == (2, projector.num_tokens(16), 12)
""",
    "vision": """    vision = registry.build("vision", {"name": "NAME"})
    image = vision(torch.randn(2, 3, *vision.transform.size))
    assert image.tokens.shape == (2, vision.num_tokens, vision.hidden_size)
    assert image.grid == vision.grid
""",
    "adapter": """    llm = registry.build("llm", {"name": "hf", "hidden_size": 32, "num_layers": 2}, vocab_size=64)
    ids = torch.arange(8).unsqueeze(0)
    base = llm.lm(input_ids=ids).logits
    adapter = registry.build("adapter", {"name": "NAME"}, llm=llm, text_dim=32)
    adapter.attach()
    assert torch.equal(llm.lm(input_ids=ids).logits, base)  # it starts as the base model
    adapter.detach()
    assert torch.equal(llm.lm(input_ids=ids).logits, base)
""",
    "distiller": """    distiller = registry.build("distiller", {"name": "NAME"})
    states, labels = torch.randn(2, 5, 8), torch.tensor([[-100, -100, -100, 7, 8]] * 2)
    out = SimpleNamespace(last_hidden_state=states, labels=labels)
    assert distiller(out, out, {})["NAME"] == 0  # teacher == student: nothing to learn
    images = torch.full((2, 3), -100)  # a teacher with three image tokens more
    more = SimpleNamespace(
        last_hidden_state=torch.cat([torch.zeros(2, 3, 8), states], 1), labels=torch.cat([images, labels], 1)
    )
    assert distiller(out, more, {})["NAME"] == 0
""",
    "dataset": """    data = registry.build("dataset", {"name": "NAME"})
    one, two = data.get(3), data.get(3)
    assert one.dialogs == two.dialogs  # the same index gives the same sample
    assert (one.images[0] == two.images[0]).all()
    assert data.get(0).images[0].shape == (64, 64, 3)
""",
    "task": """    task = registry.build("task", {"name": "NAME"})
    dialog = Dialog([], answers=["red"])
    rows = [task.score(dialog, text) for text in ("It is red.", "It is blue.")]
    assert task.summarise(rows)["mentioned"].value == 0.5
""",
}
