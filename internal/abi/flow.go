package abi

// Types of what a flow rule looks at (enum ib_flow_spec_type, in the kernel's include/rdma/ib_verbs.h: no header for user space has it).
const (
	FlowSpecEth  = 0x20
	FlowSpecIPv4 = 0x30
	FlowSpecIPv6 = 0x31
	FlowSpecTCP  = 0x40
	FlowSpecUDP  = 0x41
)
