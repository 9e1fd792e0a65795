"""What training does about faults: which are retried, how often, and what the user is told.

what goes wrong                           what happens
wrong input or a wrong number             not retried, since a retry would meet it again: the worker writes the
(UserError, WorkError in a worker)        failure file, and the driver raises its error
a full disk, an index out of range        the same
a worker killed because its node runs     the same, written by the controller
out of memory
any other exception, out of GPU memory    Ray starts the whole group again; where the same exception comes at the same
too                                       step, it is not retried any more
a worker, a node or its connection dies   Ray starts the whole group again, `train.max_failures` times; every job
                                          resumes from its newest whole checkpoint
a worker no longer responds               the same, after `cluster.silent_minutes`
the group cannot be placed                waited for, `cluster.node_wait_minutes`
a node is taken away with notice          Ray starts the group again; it does not count as a failure
Ctrl-C                                    Ray stops the workers; checkpoints stay, and the same command resumes

    policy.py      in a worker and in the driver: what is retried, what is raised at the end
    causes.py      Ray's errors in words
    controller.py  in Ray Train's controller: says what happened to the group, as it happens
"""
