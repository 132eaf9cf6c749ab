package main

import "strings"

// capitals are the words that are not written with one capital letter at their head: the specification's initials, and
// names that are spelled in a way of their own.
var capitals = func() map[string]string {
	m := map[string]string{
		"lkey": "LKey", "rkey": "RKey", "qkey": "QKey", "pkey": "PKey", "pkeys": "PKeys", "raddr": "RAddr", "laddr": "LAddr",
		"ipv4": "IPv4", "ipv6": "IPv6", "uars": "UARs", "bfregs": "BFRegs", "bfreg": "BFReg",
	}
	for w := range strings.FieldsSeq(`
		ah av bf cq cqe cqn db dci dgid dlid dma dmac ece fd fw gid grh guid hca ib id ip iova klms lid lmc mr mtu
		mw odp pd pdn ps psn qp qpn rc rnr rq rqe rqn rss sge sgid sl slid sm sq sqe sqn srq srqn ss ssn tm uar uc
		ud uhw uid va vl wc wq wqe wqebb wr xrc xrcd xsrq`) {
		m[w] = strings.ToUpper(w)
	}
	return m
}()

// camel turns a C name into an exported Go name: max_send_wr into MaxSendWR. Only underscores and the case of letters
// change, so the tests can go the other way.
func camel(c string) string {
	var b strings.Builder
	for w := range strings.SplitSeq(c, "_") {
		if s, ok := capitals[w]; ok {
			b.WriteString(s)
		} else if w != "" {
			b.WriteString(strings.ToUpper(w[:1]) + w[1:])
		}
	}
	return b.String()
}
