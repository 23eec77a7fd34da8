"""Settings of the whole suite."""

from hypothesis import HealthCheck, settings

# A busy machine is no failure: properties are tested for what they say, not for how long it takes.
settings.register_profile("steady", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")
