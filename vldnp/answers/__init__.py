"""What a VLM says, in words or in JSON, read by grammar: which terms it says are there. It knows
neither pictures nor models, and no term but those that it is given.
"""
