"""What lmms-eval finds through the entry point group `lmms_eval.models`: the name `zoo`, and where its class is.

    python -m lmms_eval --model zoo --model_args model=llava15_7b,dtype=bfloat16 --tasks pope

Nothing of ours is imported until the model is asked for.
"""

from typing import Any


def manifest() -> Any:
    """Describe the model `zoo` to lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="zoo", simple_class_path="zoo.evaluation.lmms_eval_model.ZooLmms")
