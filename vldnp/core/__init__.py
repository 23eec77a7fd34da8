"""The paper, and nothing else: the sampler, the guidance rules, when the VLM is asked and what its
answers mean. It knows no baseline, no benchmark and no file of a run.
"""
