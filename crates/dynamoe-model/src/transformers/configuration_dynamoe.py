"""The configuration of a DynaMoE model: that of its dense base model, with the section `dynamoe` beside it."""

import functools

from transformers import AutoConfig, PreTrainedConfig

FORMAT_VERSION = 3  # the newest version of the checkpoint format that this file reads


class DynaMoeConfig(PreTrainedConfig):
    """Reads as `DynaMoeConfig`; what is returned is the base's configuration class with `model_type` "dynamoe"."""

    model_type = "dynamoe"

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        section = config_dict.get("dynamoe")
        if section is None:
            raise ValueError('config.json has no section "dynamoe": this is not a DynaMoE checkpoint')
        if section["version"] > FORMAT_VERSION:
            raise ValueError(
                f"the checkpoint has format version {section['version']}, this code reads versions 1 to "
                f"{FORMAT_VERSION}: take modeling_dynamoe.py and configuration_dynamoe.py of a newer dynamoe"
            )
        config_class = _config_class(section["base_model_type"])
        # the base's own from_dict, which settles its keys (rotary parameters, types, …)
        return super(DynaMoeConfig, config_class).from_dict(dict(config_dict), **kwargs)


@functools.cache
def _config_class(base_model_type):
    base = type(AutoConfig.for_model(base_model_type))
    return type("DynaMoeConfig", (DynaMoeConfig, base), {"model_type": "dynamoe", "__module__": __name__})
