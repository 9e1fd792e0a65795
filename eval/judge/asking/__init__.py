"""How a judge is asked: `address` of its endpoint and the key; `refusals` say what an endpoint that refuses means."""
