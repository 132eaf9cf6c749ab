// Package cmemu is the kernel's connection manager for the clients of emulated devices (package mlx5emu): what /dev/infiniband/rdma_cm
// is to a program, command by command and event by event (drivers/infiniband/core, ucma.c and cma.c), with the software NIC's protocol
// engine (package softnic/cm) behind it. So peers are whoever speaks the InfiniBand connection manager's protocol: clients of the same
// or another emulation, software NICs, the kernel's rdma_cm.
//
// A Manager stands for the rdma_cm of a host, a Channel for one open file of it. Where a program would see the kernel from its system
// call, whoever has caught that call hands the command to Channel.Write.
//
// Everything that comes in is a client's or a peer's word, and what either can have the Manager keep is bounded. What is
// managed are reliable connections and services of datagrams between IP addresses (RDMA_PS_TCP, RDMA_PS_UDP), no multicast groups. Different from the kernel: no hardware address is looked for when an
// address is resolved, so that a host that is not there shows when it is connected to; a loopback address is one like all others; and
// an address of which another process has UDP port 4791 is in use.
package cmemu
