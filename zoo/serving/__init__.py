"""A server of the OpenAI chat protocol, and pruners in serving engines that are not ours."""
