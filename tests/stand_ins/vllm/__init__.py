"""What the plug-in uses of vLLM, where it is not installed: written by its public interface, a name like each there."""


class ModelRegistry:
    registered: dict = {}

    @classmethod
    def register_model(cls, architecture, where):
        cls.registered[architecture] = where
