package uverbs

import (
	"encoding/binary"
	"errors"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// CreateFlow makes a flow rule for a queue pair.
func (f *File) CreateFlow(qp uint32, r *ib.FlowRule) (handle uint32, err error) {
	specs, n := flowSpecs(r)
	cmd := abi.CreateFlow{QPHandle: qp, FlowAttr: abi.FlowAttr{Type: uint32(r.Kind), Size: uint16(len(specs)), Priority: r.Priority, NumOfSpecs: n, Port: r.Port}}
	var resp abi.CreateFlowResp
	err = f.Write("create_flow", &WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_FLAG_EXTENDED | abi.IB_USER_VERBS_EX_CMD_CREATE_FLOW,
		In: append(append([]byte(nil), Bytes(&cmd)...), specs...), Out: Bytes(&resp)})
	hintNetRaw(err)
	return resp.FlowHandle, err
}

// DestroyFlow ends a flow rule.
func (f *File) DestroyFlow(handle uint32) error {
	return f.Write("destroy_flow", &WriteCmd{Cmd: abi.IB_USER_VERBS_CMD_FLAG_EXTENDED | abi.IB_USER_VERBS_EX_CMD_DESTROY_FLOW,
		In: Bytes(&abi.DestroyFlow{FlowHandle: handle})})
}

// hintNetRaw says which right is missing for frames that the kernel does not look at.
func hintNetRaw(err error) {
	var ce *CmdError
	if errors.As(err, &ce) && ce.Errno == unix.EPERM {
		ce.Hint = "raw packet queue pairs and flow rules need CAP_NET_RAW"
	}
}

// flowSpecs writes a rule's filters as commands have them (struct ib_uverbs_flow_spec_eth and so on), and returns how many there are.
func flowSpecs(r *ib.FlowRule) (b []byte, n uint8) {
	add := func(typ uint32, value, mask []byte) {
		const head = 8
		b = binary.NativeEndian.AppendUint32(b, typ)
		b = binary.NativeEndian.AppendUint16(b, uint16(head+len(value)+len(mask)))
		b = append(b, 0, 0)
		b = append(append(b, value...), mask...)
		n++
	}
	if f := r.Eth; f != nil {
		add(abi.FlowSpecEth, ethFilter(&f.Value), ethFilter(&f.Mask))
	}
	if f := r.IPv4; f != nil {
		add(abi.FlowSpecIPv4, ipv4Filter(&f.Value), ipv4Filter(&f.Mask))
	}
	if f := r.IPv6; f != nil {
		add(abi.FlowSpecIPv6, ipv6Filter(&f.Value), ipv6Filter(&f.Mask))
	}
	if f := r.TCP; f != nil {
		add(abi.FlowSpecTCP, portsFilter(&f.Value), portsFilter(&f.Mask))
	}
	if f := r.UDP; f != nil {
		add(abi.FlowSpecUDP, portsFilter(&f.Value), portsFilter(&f.Mask))
	}
	return b, n
}

func ethFilter(h *ib.FlowEth) []byte {
	b := append(append([]byte(nil), h.Dst[:]...), h.Src[:]...)
	b = binary.BigEndian.AppendUint16(b, h.Type)
	return binary.BigEndian.AppendUint16(b, h.VLAN)
}

func ipv4Filter(h *ib.FlowIPv4) []byte {
	b := append(append([]byte(nil), h.Src[:]...), h.Dst[:]...)
	return append(b, h.Protocol, h.TOS, 0, 0) // and TTL and flags
}

func ipv6Filter(h *ib.FlowIPv6) []byte {
	b := append(append([]byte(nil), h.Src[:]...), h.Dst[:]...)
	b = binary.BigEndian.AppendUint32(b, h.FlowLabel)
	return append(b, h.NextHeader, h.TrafficClass, 0, 0) // and hop limit
}

func portsFilter(h *ib.FlowPorts) []byte {
	return binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, h.Dst), h.Src)
}
