"""The REST contract: request bodies into checked columns, answers and errors out of them, and what may be refused."""
