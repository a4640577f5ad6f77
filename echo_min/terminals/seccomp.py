"""The system calls that are refused to the agent in a sandbox."""

import errno
import platform
import struct

MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # as the kernel names them
REFUSED = {  # number on x86_64, on aarch64
    # memory outside of processes and file systems, which no limit counts
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186),
    "semget": (64, 190), "mq_open": (240, 180), "vmsplice": (278, 75), "io_uring_setup": (425, 425),
    "userfaultfd": (323, 282), "bpf": (321, 280), "perf_event_open": (298, 241),
    # of which all sandboxes of a user share a few
    "inotify_init": (253, None), "inotify_init1": (294, 26), "fanotify_init": (300, 262),
    # what would outlive the episode
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "setxattr": (188, 5),
    "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463), "file_setattr": (469, 469),
}  # fmt: skip
RELAY = (0, [1], False)  # done to pid 1
CHECKED = {  # numbers -> an argument, values, whether these are allowed or all others are
    # unix, inet, inet6, netlink: no namespace holds the others; vsock reaches a virtual machine's host
    "socket": ((41, 198), (0, [1, 2, 10, 16], True)),
    # F_SETSIG, F_SETPIPE_SZ and write hints stay with the pipe that commands print to; F_SETLEASE stops who
    # opens the file, F_NOTIFY tells of it
    "fcntl": ((72, 25), (1, [10, 1031, 1036, 1038, 1024, 1026], False)),
    # FS_IOC_SETFLAGS, FS_IOC32_SETFLAGS, FS_IOC_FSSETXATTR stay with the work folder
    "ioctl": ((16, 29), (1, [0x40086602, 0x40046602, 0x401C5820], False)),
    "prlimit64": ((302, 261), RELAY), "sched_setparam": ((142, 118), RELAY),
    "sched_setscheduler": ((144, 119), RELAY), "sched_setattr": ((314, 274), RELAY),
    "sched_setaffinity": ((203, 122), RELAY), "setpriority": ((141, 140), (1, [1], False)),
}  # fmt: skip


def program() -> bytes | None:
    """struct sock_filter[], which says ENOSYS to those calls. None where their numbers are not known."""
    machine = platform.machine()
    if machine not in MACHINES:
        return None
    column = list(MACHINES).index(machine)
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    allow, refuse = (answer, 0, 0, 0x7FFF0000), (answer, 0, 0, 0x00050000 | errno.ENOSYS)
    # (code, lines to skip if true, if false, operand); data at 0: the call, 4: architecture, 16: arguments
    lines = [(load, 0, 0, 4), (equal, 1, 0, MACHINES[machine]), refuse, (load, 0, 0, 0)]
    lines += [(at_least, 0, 1, 0x40000000), refuse]  # the x32 calls
    for numbers in REFUSED.values():
        if numbers[column] is not None:
            lines += [(equal, 0, 1, numbers[column]), refuse]
    for numbers, (argument, values, allowed) in CHECKED.values():
        lines += [(equal, 0, len(values) + 3, numbers[column]), (load, 0, 0, 16 + 8 * argument)]
        lines += [(equal, len(values) - i, 0, value) for i, value in enumerate(values)]
        lines += [refuse, allow] if allowed else [allow, refuse]
    return b"".join(struct.pack("=HBBI", *line) for line in [*lines, allow])
