"""The entry point of lmms-eval (group `lmms_eval.models`): the name `zoo`, and the module of its class.

    python -m lmms_eval --model zoo --model_args model=llava15_7b,dtype=bfloat16 --tasks pope
    python -m lmms_eval --model zoo --model_args model=llava15_7b,pruner=fastervlm:llava15_144 --tasks pope

The rest of the zoo is imported only when lmms-eval asks for the model.
"""

from typing import Any


def manifest() -> Any:
    """Describe the model `zoo` to lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="zoo", simple_class_path="zoo.evaluation.lmms_eval_model.ZooLmms")
