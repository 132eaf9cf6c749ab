package netlink

import (
	"encoding/binary"
	"errors"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// reply is a message from the kernel.
func reply(typ, flags uint16, seq uint32, body ...byte) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(body)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = binary.NativeEndian.AppendUint16(b, flags)
	b = binary.NativeEndian.AppendUint32(b, seq)
	b = append(append(b, 0, 0, 0, 0), body...)
	return append(b, make([]byte, -len(b)&3)...)
}

func errnoBody(errno int32, more ...byte) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(-errno))
	b = binary.NativeEndian.AppendUint32(b, unix.SizeofNlMsghdr) // the request
	return append(append(b, make([]byte, 12)...), more...)
}

func TestReplies(t *testing.T) {
	text := Message(nil).Text(unix.NLMSGERR_ATTR_MSG, "no such device type")
	for _, c := range []struct {
		name string
		wire []byte
		done bool
		err  error
		text string
	}{
		{"acknowledged", reply(unix.NLMSG_ERROR, 0, 9, errnoBody(0)...), true, nil, ""},
		{"another's", reply(unix.NLMSG_ERROR, 0, 8, errnoBody(22)...), false, nil, ""},
		{"refused", reply(unix.NLMSG_ERROR, 0, 9, errnoBody(17)...), true, unix.EEXIST, ""},
		{"explained", reply(unix.NLMSG_ERROR, unix.NLM_F_ACK_TLVS, 9, errnoBody(22, text...)...), true, unix.EINVAL, "no such device type"},
		{"explained, capped", reply(unix.NLMSG_ERROR, unix.NLM_F_ACK_TLVS|unix.NLM_F_CAPPED, 9, errnoBody(22, text...)...), true, unix.EINVAL, "no such device type"},
		{"the end of a dump", reply(unix.NLMSG_DONE, 0, 9, 0, 0, 0, 0), true, nil, ""},
		{"the end of an old kernel's dump", reply(unix.NLMSG_DONE, 0, 9), true, nil, ""},
		{"a dump that failed", reply(unix.NLMSG_DONE, unix.NLM_F_MULTI, 9, errnoBody(22)[:4]...), true, unix.EINVAL, ""},
		{"a dump that failed, explained", reply(unix.NLMSG_DONE, unix.NLM_F_MULTI|unix.NLM_F_ACK_TLVS, 9, append(errnoBody(22)[:4], text...)...),
			true, unix.EINVAL, "no such device type"},
	} {
		done, err := replies(c.wire, 9, nil)
		if done != c.done || !errors.Is(err, c.err) || c.text != "" && !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v, %v", c.name, done, err)
		}
	}
	if _, err := replies(reply(unix.NLMSG_ERROR, 0, 9, 1, 2), 9, nil); err == nil {
		t.Error("a short acknowledgement is no error")
	}
	long := reply(unix.NLMSG_DONE, 0, 9)
	long[0] = 200
	if _, err := replies(long, 9, nil); err == nil {
		t.Error("a length past the end is no error")
	}
}

func TestDump(t *testing.T) {
	body := func(index uint32, name string) []byte {
		return Message(nil).U32(1, index).Text(2, name)
	}
	wire := append(reply(uint16(5<<10|1), unix.NLM_F_MULTI, 4, body(2, "rxe0")...), reply(uint16(5<<10|1), unix.NLM_F_MULTI, 4, body(7, "siw10")...)...)
	wire = append(wire, reply(unix.NLMSG_DONE, unix.NLM_F_MULTI, 4, 0, 0, 0, 0)...)
	names := ""
	done, err := replies(wire, 4, func(b []byte) {
		if err := Attributes(b, func(typ uint16, value []byte) {
			if typ == 2 {
				names += string(value)
			}
		}); err != nil {
			t.Error(err)
		}
	})
	if !done || err != nil || names != "rxe0\x00siw10\x00" {
		t.Errorf("%v, %v, %q", done, err, names)
	}
}

func TestAttributesRefused(t *testing.T) {
	for _, b := range [][]byte{{3, 0, 1, 0}, {9, 0, 1, 0, 1, 2, 3, 4}} {
		if err := Attributes(b, func(uint16, []byte) {}); err == nil {
			t.Errorf("%v is no error", b)
		}
	}
}
