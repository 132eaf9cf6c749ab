package ib

import (
	"errors"
	"fmt"
)

// MAC is an Ethernet address.
type MAC [6]byte

func (m MAC) String() string {
	return fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", m[0], m[1], m[2], m[3], m[4], m[5])
}

// IsMulticast reports whether the address is that of a group; the broadcast address is one.
func (m MAC) IsMulticast() bool { return m[0]&1 != 0 }

// FlowKind is which frames a FlowRule takes. Values are enum ibv_flow_attr_type's.
type FlowKind uint32

const (
	FlowMatch     FlowKind = 0 // those that all filters of the rule match; without filters, all frames
	FlowDefault   FlowKind = 1 // those that no FlowMatch rule has taken
	FlowMulticast FlowKind = 2 // those to groups that no FlowMatch rule has taken
	FlowSniffer   FlowKind = 3 // a copy of all that comes in and goes out at the port, whoever else gets it
)

func (k FlowKind) String() string {
	switch k {
	case FlowMatch:
		return "match"
	case FlowDefault:
		return "default"
	case FlowMulticast:
		return "multicast"
	case FlowSniffer:
		return "sniffer"
	}
	return fmt.Sprintf("FlowKind(%d)", uint32(k))
}

// A FlowRule says which of the frames that come in at a port a raw packet queue pair gets.
//
// Of the rules that match a frame, that with the lowest Priority takes it; among rules of one priority that match the same frames
// otherwise than by the same filters, which one does is the device's choice. Several queue pairs with equal rules each get a copy. What no
// rule matches goes to the port's net device, as if there were no rules.
type FlowRule struct {
	Kind     FlowKind
	Port     uint8  // default 1
	Priority uint16 // of a FlowMatch; devices have few of them (mlx5: 0 to 15)

	// Filters, of a FlowMatch only. A frame has to match all that are there. A filter for a protocol matches no frames of others.
	Eth  *FlowFilter[FlowEth]
	IPv4 *FlowFilter[FlowIPv4] // not beside IPv6
	IPv6 *FlowFilter[FlowIPv6]
	TCP  *FlowFilter[FlowPorts] // not beside UDP
	UDP  *FlowFilter[FlowPorts]
}

// A FlowFilter matches headers whose fields are Value's in the bits that Mask has.
type FlowFilter[T any] struct{ Value, Mask T }

// FlowEth is what filters look at in an Ethernet header. Numbers are in host byte order, as in the filters below.
type FlowEth struct {
	Dst, Src MAC
	Type     uint16 // behind the VLAN tag, if there is one
	VLAN     uint16 // tag control information; a mask other than 0 matches only frames that have a tag
}

// FlowIPv4 is what filters look at in an IPv4 header.
type FlowIPv4 struct {
	Src, Dst [4]byte
	Protocol uint8
	TOS      uint8
}

// FlowIPv6 is what filters look at in an IPv6 header.
type FlowIPv6 struct {
	Src, Dst     [16]byte
	FlowLabel    uint32 // 20 bits
	NextHeader   uint8
	TrafficClass uint8
}

// FlowPorts is what filters look at in a TCP or UDP header.
type FlowPorts struct{ Dst, Src uint16 }

// Check returns what contradicts itself in the rule, or nil. What a device cannot do is its own affair.
func (r *FlowRule) Check() error {
	filters := r.Eth != nil || r.IPv4 != nil || r.IPv6 != nil || r.TCP != nil || r.UDP != nil
	switch {
	case r.Kind > FlowSniffer:
		return fmt.Errorf("ib: unknown kind of flow rule %v", r.Kind)
	case r.Kind != FlowMatch && (filters || r.Priority != 0):
		return fmt.Errorf("ib: a flow rule of kind %v has neither filters nor a priority", r.Kind)
	case r.IPv4 != nil && r.IPv6 != nil:
		return errors.New("ib: no frame is both IPv4 and IPv6")
	case r.TCP != nil && r.UDP != nil:
		return errors.New("ib: no frame is both TCP and UDP")
	case r.IPv6 != nil && (r.IPv6.Value.FlowLabel|r.IPv6.Mask.FlowLabel)>>20 != 0:
		return errors.New("ib: a flow label has 20 bits")
	}
	return nil
}
