package cmemu

import (
	"encoding/binary"
	"testing"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/mlx5emu"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A client may write anything. A script is a row of commands: a byte with the number, one that chooses what of the argument is replaced
// by an ID's number, two with the argument's length, and the argument.
func FuzzWrite(f *testing.F) {
	d, err := mlx5emu.NewDevice(mlx5emu.Config{Numbered: true})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { d.Close() })
	for _, s := range scripts() {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, script []byte) {
		m := New([]*mlx5emu.Device{d})
		var rs [2]*raw
		for i := range rs {
			r := &raw{t: t, mem: &arena{}}
			if r.c, err = m.Open(r.mem); err != nil {
				t.Fatal(err)
			}
			rs[i] = r
		}
		other := func(fd int) (*Channel, bool) { return rs[fd&1].c, true }
		for n := 0; len(script) >= 4 && n < 100; n++ {
			cmd, how, size := script[0], script[1], int(binary.LittleEndian.Uint16(script[2:]))
			script = script[4:]
			size = min(size, len(script), 4096)
			in := append([]byte(nil), script[:size]...)
			script = script[size:]
			r := rs[how&1]
			switch { // where commands have an ID: what is random is hardly one's
			case how&2 != 0 && len(in) >= 4:
				native.PutUint32(in, uint32(how>>4))
			case how&4 != 0 && len(in) >= 12:
				native.PutUint32(in[8:], uint32(how>>4))
			case how&8 != 0 && len(in) >= 284:
				native.PutUint32(in[272+int(cmd&8):], uint32(how>>4))
			}
			if leaves(cmd, in) {
				continue
			}
			b := append(bytesOf(&abi.CMCmdHdr{Cmd: uint32(cmd), In: uint16(len(in)), Out: 1024}), in...)
			r.c.Write(b, other)
		}
		for _, r := range rs {
			r.c.Close()
		}
		m.empty(t)
		m.Close()
	})
}

// leaves reports whether a command leads to somebody beyond this machine.
func leaves(cmd byte, in []byte) bool {
	at := map[byte]int{abi.RDMA_USER_CM_CMD_RESOLVE_ADDR: 144, abi.RDMA_USER_CM_CMD_RESOLVE_IP: 28}[cmd]
	if at == 0 || len(in) < at+2 {
		return false
	}
	a, ok := readSockaddr(in[at:])
	return ok && !a.ip.IsLoopback()
}

// scripts are what programs do.
func scripts() [][]byte {
	var s []byte
	add := func(cmd, how byte, in []byte) {
		s = append(append(s, cmd, how, byte(len(in)), byte(len(in)>>8)), in...)
	}
	put := func(b []byte, a sockaddr) uint16 { return uint16(a.put(b)) }
	at := sockaddr{family: 2, ip: loopback, port: 7471}
	create := func() {
		add(abi.RDMA_USER_CM_CMD_CREATE_ID, 0, bytesOf(&abi.CMCreateID{UID: 1, Response: arenaAt, PS: abi.RDMA_PS_TCP}))
	}
	event := func() { add(abi.RDMA_USER_CM_CMD_GET_EVENT, 0, bytesOf(&abi.CMGetEvent{Response: arenaAt})) }
	attr := func(id byte, st ib.QPState) {
		add(abi.RDMA_USER_CM_CMD_INIT_QP_ATTR, 4|id<<4, bytesOf(&abi.CMInitQPAttr{Response: arenaAt, QPState: uint32(st)}))
	}
	create()
	bind := abi.CMBind{}
	bind.AddrSize = put(bytesOf(&bind.Addr), at)
	add(abi.RDMA_USER_CM_CMD_BIND, 2, bytesOf(&bind))
	add(abi.RDMA_USER_CM_CMD_LISTEN, 2, bytesOf(&abi.CMListen{Backlog: 4}))
	listening := len(s)
	create()
	resolve := abi.CMResolveAddr{TimeoutMs: 1}
	resolve.DstSize = put(bytesOf(&resolve.DstAddr), at)
	add(abi.RDMA_USER_CM_CMD_RESOLVE_ADDR, 2|1<<4, bytesOf(&resolve))
	event()
	add(abi.RDMA_USER_CM_CMD_RESOLVE_ROUTE, 2|1<<4, bytesOf(&abi.CMResolveRoute{TimeoutMs: 1}))
	event()
	attr(1, ib.Init)
	add(abi.RDMA_USER_CM_CMD_CONNECT, 8|1<<4, bytesOf(&abi.CMConnect{ConnParam: abi.CMConnParam{QPNum: 77, Valid: 1}}))
	for range 3 { // the request takes its time
		event()
		attr(2, ib.RTR)
	}
	accept := abi.CMAccept{UID: 2, ConnParam: abi.CMConnParam{QPNum: 78, Valid: 1}}
	add(abi.RDMA_USER_CM_CMD_ACCEPT, 8|2<<4, bytesOf(&accept))
	event()
	add(abi.RDMA_USER_CM_CMD_ACCEPT, 8|1<<4, bytesOf(&abi.CMAccept{}))
	for _, id := range []byte{0, 1, 2} {
		for o := range uint32(3) {
			add(abi.RDMA_USER_CM_CMD_QUERY, 4|id<<4, bytesOf(&abi.CMQuery{Response: arenaAt, Option: o}))
		}
		add(abi.RDMA_USER_CM_CMD_QUERY_ROUTE, 4|id<<4, bytesOf(&abi.CMQuery{Response: arenaAt}))
		add(abi.RDMA_USER_CM_CMD_NOTIFY, 2|id<<4, bytesOf(&abi.CMNotify{Event: uint32(ib.EventCommEst)}))
		add(abi.RDMA_USER_CM_CMD_DISCONNECT, 2|id<<4, bytesOf(&abi.CMDisconnect{}))
		add(abi.RDMA_USER_CM_CMD_REJECT, 2|id<<4, bytesOf(&abi.CMReject{PrivateDataLen: 3}))
		add(abi.RDMA_USER_CM_CMD_MIGRATE_ID, 1|4|id<<4, bytesOf(&abi.CMMigrateID{Response: arenaAt}))
		event()
		add(abi.RDMA_USER_CM_CMD_DESTROY_ID, 1|4|id<<4, bytesOf(&abi.CMDestroyID{Response: arenaAt}))
	}
	whole := s
	s = append([]byte(nil), whole[:listening]...)
	bindIP, resolveIP := abi.CMBindIP{ID: 1}, abi.CMResolveIP{ID: 1, TimeoutMs: 1}
	create()
	put(bytesOf(&bindIP.Addr), anyOf(2))
	add(abi.RDMA_USER_CM_CMD_BIND_IP, 0, bytesOf(&bindIP))
	put(bytesOf(&resolveIP.DstAddr), at)
	add(abi.RDMA_USER_CM_CMD_RESOLVE_IP, 0, bytesOf(&resolveIP))
	add(abi.RDMA_USER_CM_CMD_SET_OPTION, 4|1<<4, bytesOf(&abi.CMSetOption{Optval: arenaAt, Optlen: 1}))
	add(abi.RDMA_USER_CM_CMD_SET_OPTION, 4|1<<4, bytesOf(&abi.CMSetOption{Optval: arenaAt, Optlen: 72, Level: 1, Optname: 1}))
	add(abi.RDMA_USER_CM_CMD_JOIN_MCAST, 0, bytesOf(&abi.CMJoinMcast{Response: arenaAt, ID: 1}))
	add(abi.RDMA_USER_CM_CMD_LEAVE_MCAST, 4, bytesOf(&abi.CMDestroyID{Response: arenaAt}))
	return [][]byte{whole, s, whole[:listening]}
}
