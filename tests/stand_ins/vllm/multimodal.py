"""The registry of processors."""


class MULTIMODAL_REGISTRY:
    @staticmethod
    def register_processor(processor, *, info, dummy_inputs):
        def add(cls):
            cls.parts = processor, info, dummy_inputs
            return cls

        return add
