package provider_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// says checks that an error has each of the words.
func says(t *testing.T, what string, err error, words ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("%s: no error", what)
		return
	}
	t.Logf("%s: %v", what, err)
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%s: %q is missing from: %v", what, w, err)
		}
	}
}

// meet connects a to b by package transport, and sends a message.
func meet(a, b *device) (*transport.Conn, *transport.Conn, error) {
	ctx, cancel := context.WithTimeout(background, testutil.Patience)
	defer cancel()
	l, err := transport.Listen(ctx, "127.0.0.1:0", &transport.Config{Context: b.Context, HandshakeTimeout: testutil.Patience, Linger: time.Second})
	if err != nil {
		return nil, nil, err
	}
	defer l.Close()
	accepted := make(chan *transport.Conn, 1)
	go func() {
		c, _ := l.Accept(ctx)
		accepted <- c
	}()
	c, err := transport.Dial(ctx, l.Addr().String(), &transport.Config{Context: a.Context, HandshakeTimeout: testutil.Patience, Linger: time.Second})
	if err != nil {
		cancel()
		<-accepted
		return nil, nil, err
	}
	s := <-accepted
	if err := c.Send(ctx, []byte("hello")); err != nil {
		return nil, nil, err
	}
	if err := s.Recv(ctx, func(*transport.Message) error { return nil }); err != nil {
		return nil, nil, err
	}
	return c, s, nil
}

// What is wrong with this side's device or its net device is said with the device, the operation, and what to do; which helps.
func TestTrouble(t *testing.T) {
	forKinds(t, func(t *testing.T, kind string) {
		d := newDevice(t, kind, kind+"d")
		n := newNode(t, d, nil)
		connect := func(sgid int) error {
			return n.q.Connect(background, qp.ConnectParams{Remote: qp.Endpoint{GID: ib.GIDFromAddr(d.addr), QPN: n.q.QPN()}, SGIDIndex: sgid})
		}
		dial := func() error {
			q := n.newQP()
			defer mustClose(t, q)
			ctx, cancel := context.WithTimeout(background, testutil.Patience)
			defer cancel()
			_, err := q.Dial(ctx, netip.AddrPortFrom(d.addr, 0), netip.AddrPortFrom(d.addr, 7473), qp.CMParams{})
			return err
		}
		transported := func() error {
			c, s, err := meet(d, d)
			if err == nil {
				mustClose(t, s, c)
			}
			return err
		}
		if kind == "rxe" {
			has := []string{d.Name(), "no GID at index 7", fmt.Sprintf("%d (%v, RoCE v2)", d.gid(), d.addr)}
			says(t, "an empty slot", connect(7), append(has, "modify_qp")...)
			_, err := n.pd.NewAH(ib.AHAttr{DGID: ib.GIDFromAddr(d.addr), SGIDIndex: 7, HopLimit: 1, Port: 1})
			says(t, "an empty slot", err, append(has, "create_ah")...)
			_, err = d.GID(1, 7)
			says(t, "an empty slot", err, append(has, "query_gid")...)
		}

		ip(t, "link set "+d.netdev+" down")
		testutil.Eventually(t, "the port is down", func() bool { p, err := d.QueryPort(1); return err == nil && p.State == ib.PortDown })
		down := []string{d.Name(), "port 1 is DOWN", "`ip link set " + d.netdev + " up`"}
		if kind == "rxe" {
			err := connect(d.gid())
			says(t, "Connect on a port that is down", err, append(down, "modify_qp")...)
			if !errors.Is(err, verbs.ErrUnreachable) {
				t.Error(err)
			}
		}
		says(t, "Dial on a port that is down", dial(), append(down, "rdma_connect")...)
		err := transported()
		says(t, "transport on a port that is down", err, down...)
		var he *transport.HandshakeError
		if !errors.As(err, &he) || he.Code != transport.RefusedUnreachable || !errors.Is(err, verbs.ErrUnreachable) {
			t.Error(err)
		}
		ip(t, "link set "+d.netdev+" up")
		testutil.Eventually(t, "the port is up", func() bool { p, err := d.QueryPort(1); return err == nil && p.State == ib.PortActive })
		if err := transported(); err != nil {
			t.Error(err)
		}

		ip(t, "address flush dev "+d.netdev)
		testutil.Eventually(t, "the address is gone", func() bool { return d.gid() < 0 })
		says(t, "transport without an address", transported(), d.Name(), "`ip address add ADDRESS/PREFIX dev "+d.netdev+"`")
		says(t, "Dial without an address", dial(), d.Name(), "rdma_connect", "no RDMA device stands on that address")
		ip(t, "address add "+d.addr.String()+"/24 dev "+d.netdev)
		testutil.Eventually(t, "the address is back", func() bool { return kind == "siw" || d.gid() >= 0 })
		if err := transported(); err != nil {
			t.Error(err)
		}
		n.close()
		mustClose(t, d)
	})
}
