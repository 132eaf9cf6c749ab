// Package emulate shows a program, and all that it starts, emulated ConnectX devices (package mlx5emu) in the place of the
// kernel's: its opens of /dev/infiniband and of the RDMA classes of /sys, and its commands to what it has opened, are answered by
// this process (package seccomp). The program may be dynamically or statically linked, in any language; nothing of it is changed or
// loaded into it, and neither root nor a kernel module is needed. Linux on amd64 and arm64 only.
//
// # What the program sees
//
//   - /dev/infiniband/uverbsN opens as a memfd, which has the context's UAR pages. So mmap and munmap are the kernel's, and
//     doorbells are stores to shared memory. Stat shows it as a character device.
//   - /dev/infiniband/rdma_cm (package cmemu) opens as the read end of a pipe, with a byte in it while there are events: so poll, select
//     and epoll are the kernel's. Its commands are writes. For the filter not to send all writes of the program here, its files have
//     numbers of a range of their own, just below those that select has no room for, or that the program may not have; writes to
//     other files that happen to have such a number are looked at, and left to the kernel.
//   - The RDMA classes of sysfs are a tree of ordinary files in a temporary folder. Opens by path are sent there, also of folders,
//     in which getdents and relative opens then work by themselves. What lists /sys/class or /dev itself does not see the devices.
//   - NETLINK_RDMA sockets are refused, as by a kernel without the RDMA subsystem, so that libraries look into sysfs. Real devices of the
//     host are hidden.
//
// # Lifetimes
//
// A context ends when the last reference to its open file goes: descriptors, inherited or sent ones included, and mappings, as with
// the kernel's file. Nothing of the program's is watched for that. The file has its own lock (flock), which the kernel lets go of at
// that moment, however it comes; a thread of this process waits for the lock. The connection manager's ends with the last reference
// to its pipe's read end, which who has the write end hears of, and not while a call waits for events.
//
// Memory is of the process that opens a device. A command from another process, to which the file was passed or which was
// forked, is refused with EPERM (EACCES by the connection manager, as the kernel has it): the emulation has one address space a
// context. After an execve the old memory is unreachable.
package emulate
