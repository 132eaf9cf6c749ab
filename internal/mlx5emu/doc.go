// Package mlx5emu is an emulated ConnectX device: the uverbs object model of Linux' mlx5 driver, and the formats of the device
// itself (UAR pages, doorbell records, WQEs, CQEs), with the software NIC as the engine behind them. Whatever drives a ConnectX
// through /dev/infiniband/uverbsN can drive it, and speaks to the software NIC's peers: through memory within the host, RoCEv2
// over UDP beyond it.
//
// It is for tests of drivers. What a driver gets wrong about formats, counters, ownership of CQEs or the order of its stores
// shows here as it would on a card; what only a card has does not: the cost and ordering of MMIO, firmware's limits, its
// undocumented checks. Nothing here was compared with hardware; the facts are from the kernel's headers and from rdma-core.
//
// Ethernet frames of raw packet queue pairs are its own affair, and not the software NIC's: a switch brings them to the other devices of
// the process.
//
// # Parts
//
// A Device is one software NIC. Each Open of it is a Context, which has its own handles, as each open file of the kernel's
// has; numbers of queue pairs and keys are the device's. Commands come in by Context.Ioctl; data moves when the device's engine
// looks at UAR pages and doorbell records: a goroutine, or the caller of Step if Config.Manual.
//
// There are two front doors. OpenKernel is the one in process: what it returns is a uverbs.Kernel. A front door for other
// processes calls Open and Ioctl itself, and gives the client Context.Pages to map.
//
// # Trust
//
// The client may be anybody, and write anything anywhere: into commands, doorbell records, UAR pages, WQEs. All of it is read
// once, into memory of ours, and checked before use. What is wrong gets the client's own queue pair or completion queue into
// the error state, or is ignored, as a device would.
package mlx5emu
