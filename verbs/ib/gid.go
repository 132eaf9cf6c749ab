package ib

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
)

// GID is a global identifier, 16 bytes in network order; on RoCE it is an IPv6 address or an IPv4-mapped one.
type GID [16]byte

// IsZero reports whether the GID is all zero: an empty slot of a GID table.
func (g GID) IsZero() bool { return g == GID{} }

// Addr returns the GID as an IP address; IPv4-mapped GIDs become IPv4 addresses.
func (g GID) Addr() netip.Addr { return netip.AddrFrom16(g).Unmap() }

// SubnetPrefix returns the upper 64 bits.
func (g GID) SubnetPrefix() uint64 { return binary.BigEndian.Uint64(g[:8]) }

// InterfaceID returns the lower 64 bits.
func (g GID) InterfaceID() uint64 { return binary.BigEndian.Uint64(g[8:]) }

// String prints the GID as eight colon-separated groups of four hex digits, as sysfs does.
func (g GID) String() string {
	s := make([]byte, 0, 39)
	for i := 0; i < 16; i += 2 {
		if i > 0 {
			s = append(s, ':')
		}
		s = fmt.Appendf(s, "%02x%02x", g[i], g[i+1])
	}
	return string(s)
}

// GIDFromAddr returns the RoCE GID of an IP address.
func GIDFromAddr(a netip.Addr) GID { return GID(a.As16()) }

var errGIDSyntax = errors.New("ib: not a GID: want an IPv6 address such as fe80::1 or an IPv4 address")

// ParseGID parses a GID written as an IPv6 or IPv4 address.
func ParseGID(s string) (GID, error) {
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" {
		return GID{}, fmt.Errorf("%w: %q", errGIDSyntax, s)
	}
	return GIDFromAddr(a), nil
}

// MarshalText writes the GID as String does.
func (g GID) MarshalText() ([]byte, error) { return []byte(g.String()), nil }

// UnmarshalText reads what ParseGID does.
func (g *GID) UnmarshalText(b []byte) error {
	v, err := ParseGID(string(b))
	if err == nil {
		*g = v
	}
	return err
}

// GIDType says which protocol a GID table entry stands for. Values are enum ib_uverbs_gid_type's.
type GIDType uint8

const (
	GIDInfiniBand GIDType = iota // InfiniBand or RoCE v1 by link layer
	GIDRoCEv1
	GIDRoCEv2
	GIDSoft // a software NIC of this library: meaningful only to other ones (not a kernel value)
)

func (t GIDType) String() string {
	switch t {
	case GIDInfiniBand:
		return "IB"
	case GIDRoCEv1:
		return "RoCE v1"
	case GIDRoCEv2:
		return "RoCE v2"
	case GIDSoft:
		return "soft"
	}
	return fmt.Sprintf("GIDType(%d)", uint8(t))
}

// GIDEntry is one used slot of a port's GID table.
type GIDEntry struct {
	Index   int
	GID     GID
	Type    GIDType
	NetDev  string // the net device the GID belongs to; empty if there is none
	PortNum uint8
	// MTU is the largest path MTU that the GID can be used with, where that differs from the port's; 0: the port's.
	MTU MTU
}

// GUID is a node or port identifier, EUI-64.
type GUID uint64

func (g GUID) String() string {
	return fmt.Sprintf("%04x:%04x:%04x:%04x", uint16(g>>48), uint16(g>>32), uint16(g>>16), uint16(g))
}

// MarshalText writes the GUID as String does: in JSON a number of 64 bits would lose its last digits to many readers.
func (g GUID) MarshalText() ([]byte, error) { return []byte(g.String()), nil }

// UnmarshalText reads what MarshalText has written: four groups of four hex digits.
func (g *GUID) UnmarshalText(b []byte) error {
	if len(b) != 19 || b[4] != ':' || b[9] != ':' || b[14] != ':' {
		return fmt.Errorf("ib: not a GUID: %q", b)
	}
	v, err := strconv.ParseUint(string(b[:4])+string(b[5:9])+string(b[10:14])+string(b[15:]), 16, 64)
	if err != nil {
		return fmt.Errorf("ib: not a GUID: %q", b)
	}
	*g = GUID(v)
	return nil
}
