from vldnp._files import checked, read_yaml

__all__ = ["checked", "read_yaml"]
