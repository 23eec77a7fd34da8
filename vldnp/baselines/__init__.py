"""What VL-DNP is compared with: SAFREE, Safe Latent Diffusion, stand-ins for the VLM. A baseline
uses the sampler and never changes it.
"""
