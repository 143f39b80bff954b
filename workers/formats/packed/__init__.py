"""Parts that formats of words of 32 bits share: the words, their checks, and the loader that lies in the artifact."""
