"""Texts and finetuning jobs in the order and with the fields that OpenAI's interface has."""
