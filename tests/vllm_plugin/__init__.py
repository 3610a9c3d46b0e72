"""Tests of the plug-in against real vLLM releases: ``make test-vllm``. Without vLLM there is nothing to collect.

The folder is not called ``vllm``: tests/ is on the import path.
"""
