"""Methods that VL-DNP is compared with. A baseline uses the sampler and never changes it."""
