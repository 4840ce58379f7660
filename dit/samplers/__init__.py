"""From noise to data: generators of states. They know no network and no file."""
