package main

import (
	"testing"

	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

func TestArgumentsOfUcmatoseThatMakeNoSense(t *testing.T) {
	for _, c := range []struct{ args, want string }{
		{"ucmatose -c 0", "0 connections"},
		{"ucmatose -C -1", "-1 messages"},
		{"ucmatose -S -1", "-1 bytes"},
		{"ucmatose -C 1000000 -S 1000000", "must fit"},
		{"ucmatose -s 10.77.0.1 -p 0", "port 0"},
		{"ucmatose -p 65536", "port 65536"},
		{"ucmatose 10.77.0.1", "unknown command"},
		{"ucmatose --ib-dev nothing", "no such device"},
		{"ucmatose -b 192.0.2.1 --ib-dev soft0", "none of this software NIC's addresses"},
	} {
		t.Run(c.args, func(t *testing.T) { fails(t, c.args, c.want) })
	}
}

// What is compared with what: the C programs compare nothing, so nobody else notices.
func TestUcmatoseNoticesWrongData(t *testing.T) {
	dev, err := verbs.Open("soft0")
	if err != nil {
		t.Fatal(err)
	}
	var objects closers
	defer objects.closeAll(&err)
	objects.add(dev)
	pd, err := dev.AllocPD()
	if err != nil {
		t.Fatal(err)
	}
	objects.add(pd)
	const count, size = 3, 5
	m, err := mr.Alloc(pd, 2*count*size, ib.AccessLocalWrite)
	if err != nil {
		t.Fatal(err)
	}
	objects.add(m)
	talk := func(numbered bool) *talker {
		o := &ucmatose{count: count, size: size, numbered: numbered}
		tk := &talker{c: &conversation{o: o, count: count}, mem: m}
		for i := range count {
			fillMessage(tk.slot(count+i), i)
			if numbered {
				fillMessage(tk.slot(i), i)
			} else {
				fillMessage(tk.slot(i), count-1)
			}
		}
		return tk
	}
	for _, c := range []struct {
		what     string
		numbered bool
		check    func(*talker) error
	}{
		{"replies", false, (*talker).checkReplies},
		{"messages that are the same", false, (*talker).checkMessages},
		{"messages that differ", true, (*talker).checkMessages},
	} {
		for i := range count {
			tk := talk(c.numbered)
			if err := c.check(tk); err != nil {
				t.Errorf("%s: %v", c.what, err)
			}
			tk.slot(i)[size-1] ^= 1
			if c.check(tk) == nil {
				t.Errorf("%s: a wrong byte in that with index %d was not noticed", c.what, i)
			}
		}
	}
}
