"""The paper, and nothing else: the sampler, the guidance rules, when the VLM is asked and what
becomes of its answers. It knows no baseline, no benchmark and no file of a run.
"""
